"""HTTP surface: every dialect at its path, and pages to look at."""

from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.server import ApiServer, serve

__all__ = ["ApiConfig", "ApiServer", "create_app", "serve"]
