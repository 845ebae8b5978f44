"""HTTP surface: OpenAI-compatible endpoints."""

from router.api.app import create_app
from router.api.config import ApiConfig
from router.api.server import ApiServer, serve
from router.api.text import Text

__all__ = ["ApiConfig", "ApiServer", "Text", "create_app", "serve"]
