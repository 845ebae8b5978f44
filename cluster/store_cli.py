"""``tracehaul store``: what an operator asks of the store nodes of a running cluster, and tells them."""

# Importing them is what makes their commands known, in the order in which they are shown.
from cluster import store_look  # noqa: F401, I001  # pyright: ignore[reportUnusedImport]
from cluster import store_act  # noqa: F401  # pyright: ignore[reportUnusedImport]
from cluster.store_session import app

__all__ = ["app"]
