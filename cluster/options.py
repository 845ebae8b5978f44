"""Options that several commands have, and sizes of memory or disk."""

from typing import Annotated, Any

import typer

from cluster.config import parse_bytes, parse_quota

KeyOption = Annotated[
    str | None, typer.Option("--key", envvar="TRACEHAUL_KEY", help="An API key that may steer, for the one at --url.")
]


def parse_size(text: str) -> int:
    """Bytes, of a size with a unit on the command line."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


SizeOption = Annotated[
    int | None,
    typer.Option(
        "--store-bytes",
        parser=parse_size,
        metavar="SIZE",
        help="Block memory of each store node, such as 512MiB or 4GiB.",
    ),
]


def _quota(text: str) -> tuple[str, int]:
    try:
        return parse_quota(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


QuotaOption = Annotated[
    list[Any] | None,
    typer.Option(
        "--quota",
        parser=_quota,
        metavar="TENANT=SIZE",
        help="Block memory of each store node that a tenant (a request's cache_salt) is sure of; repeat for others.",
    ),
]
DiskOption = Annotated[
    int | None,
    typer.Option(
        "--disk-bytes",
        parser=parse_size,
        metavar="SIZE",
        help="Disk of each store node for blocks, kept over restarts.",
    ),
]
S3Option = Annotated[
    int | None,
    typer.Option(
        "--s3-bytes", parser=parse_size, metavar="SIZE", help="The most that each store node keeps in the bucket."
    ),
]
