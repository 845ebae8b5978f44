"""OpenAI's responses: items in, items out, and what was said can be kept for the next."""

from router.dialects.responses.dialect import Responses

__all__ = ["Responses"]
