"""The engine beside vLLM, and what it answers."""
