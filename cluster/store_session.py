"""What the commands of ``tracehaul store`` share: options, finding the nodes, telling what came of it."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from cluster.members import Answers, Found, StoreRef, find
from cluster.prompts import Blocks, Source, blocks_of
from cluster.rundir import ClusterFault, RunDir
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.wire.ids import NodeId

T = TypeVar("T")

err = Console(stderr=True)
out = Console()
PIPE_COLUMNS = 200
"""A pipe has no width to respect."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Look at the KV store's nodes and tell them what to do, without stopping anything.",
)

NodeArgument = Annotated[str | None, typer.Argument(help="A store node, such as store-0. Default: all of them.")]
UrlOption = Annotated[str | None, typer.Option(help="Base URL of a cluster's API. Default: the one started here.")]
RunDirOption = Annotated[Path, typer.Option("--run-dir", help="Where the cluster's state and logs are.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For scripts: answers and errors by node, as JSON.")]
PromptOption = Annotated[
    Path | None, typer.Option("--prompt", help="A text file, tokenized as /v1/completions does; - is stdin.")
]
ChatOption = Annotated[
    Path | None, typer.Option("--chat", help="A JSON list of messages, rendered as /v1/chat/completions does.")
]
TokensOption = Annotated[Path | None, typer.Option("--tokens", help="A file of token ids; - is stdin.")]
HashOption = Annotated[list[str] | None, typer.Option("--hash", help="A block's hash in hex; may be repeated.")]
SaltOption = Annotated[str, typer.Option("--salt", help="The cache salt of the calls in question.")]
TenantOption = Annotated[str, typer.Option("--tenant", help="Whose; empty: no tenant's.")]
DEFAULT_RUN_DIR = Path(".run")


class Session(NamedTuple):
    """What a command works with."""

    found: Found
    refs: list[StoreRef]
    peers: Peers
    blocks: Blocks
    """Those that the command names, if it names any."""


def with_nodes(
    url: str | None,
    run_dir: Path,
    node: str | None,
    work: Callable[[Session], Coroutine[None, None, T]],
    source: Source | None = None,
) -> T:
    """Find the cluster, the nodes and the blocks that are meant, and do ``work`` with them."""
    found = find(url, RunDir(run_dir))
    if found.router_lost is not None:
        warning = f"tracehaul: {found.router_lost}. Asking the store nodes that were started here."
        err.print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)
    refs = found.select(node)
    blocks = blocks_of(source, found) if source is not None else Blocks([], 0)

    async def main() -> T:
        peers = Peers(TcpNetwork())
        try:
            return await work(Session(found, refs, peers, blocks))
        finally:
            await peers.close()

    return asyncio.run(main())


def show(table: Table) -> None:
    """On standard output, as wide as it needs to be if that is no terminal."""
    console = out if out.is_terminal else Console(width=PIPE_COLUMNS)
    console.print(table)


def echo(got: Mapping[NodeId, Any], failed: Mapping[NodeId, str]) -> None:
    """The JSON answer of every command: ``{"nodes": {NAME: …}, "errors": {NAME: WHY}}``."""
    text = msgspec.json.encode({"nodes": dict(got), "errors": dict(failed)})
    typer.echo(msgspec.json.format(text, indent=2).decode())


def end(failed: Mapping[NodeId, str]) -> None:
    """Raises ClusterFault if some node did not do its part: one line, exit code 1."""
    if failed:
        alike: dict[str, list[NodeId]] = {}
        for node, why in failed.items():
            alike.setdefault(why, []).append(node)
        raise ClusterFault("; ".join(f"{', '.join(nodes)} {why}" for why, nodes in alike.items()))


def told(answers: Answers[Any], table: Callable[[], Table], as_json: bool) -> None:
    """Most commands' end: what was answered, then what was not."""
    if as_json:
        echo(answers.got, answers.failed)
    elif answers.got:
        show(table())
    end(answers.failed)
