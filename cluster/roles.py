"""``tracehaul flip``: an operator changes what a worker of a running cluster is there for."""

import asyncio
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer
from rich.console import Console

from cluster.api import Api, here
from cluster.options import KeyOption
from cluster.plan import load_plan
from cluster.rundir import ClusterFault, RunDir
from router.dialects.openai.errors import ErrorBody
from router.dispatch.flips import VERIFY_S, FlipOutcome
from tracehaul.wire.cluster import FLIP_MARGIN_S

TIMEOUT_S = 600.0 + FLIP_MARGIN_S + VERIFY_S
"""What runs may be given long to end."""
ROLES = ("prefill", "decode")

out = Console()


def flip(
    node: Annotated[str, typer.Argument(help="Which worker, such as decode-1.")],
    to: Annotated[str, typer.Option("--to", help="prefill or decode.")],
    url: Annotated[str | None, typer.Option(help="Base URL of a cluster's API. Default: the one started here.")] = None,
    key: KeyOption = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where the cluster's state and logs are.")] = Path(".run"),
) -> None:
    """Give a worker the other role, with the engine, the weights and the contexts that it has.

    It is given no more steps, ends those that it runs or lets them go on elsewhere, and comes back in its new role;
    where that does not come to pass it goes on as it was. When it is started anew it has the role of the config.

    Example:

      tracehaul flip decode-1 --to prefill
    """
    if to not in ROLES:
        raise ClusterFault(f"--to must be {' or '.join(ROLES)}, not {to!r}")
    run = RunDir(run_dir)
    outcome = asyncio.run(_ask(here(load_plan(run), run) if url is None else Api(url, key), node, to))
    out.print(f"{node} is a {outcome.role} worker, after {outcome.seconds:.1f} s.", highlight=False, soft_wrap=True)


async def _ask(api: Api, node: str, role: str) -> FlipOutcome:
    try:
        async with httpx.AsyncClient(**api.options(), timeout=TIMEOUT_S) as client:
            answer = await client.post(f"/cluster/{node}/role", json={"role": role})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ClusterFault(f"no router answers at {api.url}: {error}") from error
    try:
        if answer.is_success:
            return msgspec.json.decode(answer.content, type=FlipOutcome)
        why = msgspec.json.decode(answer.content, type=ErrorBody).error.message
    except msgspec.DecodeError as error:
        raise ClusterFault(f"{api.url} answers, but not as a tracehaul router: {error}") from error
    raise ClusterFault(f"{node} keeps its role: {why}")


def register(app: typer.Typer) -> None:
    """Add it to the command line."""
    app.command()(flip)
