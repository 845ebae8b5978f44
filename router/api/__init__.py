"""HTTP surface: OpenAI-compatible endpoints."""
