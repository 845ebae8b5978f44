"""Webhooks: who is told, over HTTP, and with which secret."""
