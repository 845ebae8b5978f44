"""OpenAI's completions, the older form: texts in, what follows them out."""

from router.dialects.completions.dialect import Completions

__all__ = ["Completions"]
