"""What runs inside vLLM's servers."""
