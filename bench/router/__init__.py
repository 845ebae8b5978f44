"""The router alone: what it adds to each call."""
