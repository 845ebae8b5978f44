"""OpenAI's chat completions."""

from router.dialects.chat.dialect import Chat

__all__ = ["Chat"]
