"""Anthropic's messages."""

from router.dialects.messages.dialect import Messages

__all__ = ["Messages"]
