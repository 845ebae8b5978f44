"""Prompt tokens in, published KV blocks and the first token out."""
