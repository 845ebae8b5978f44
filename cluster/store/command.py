"""What the commands of ``tracehaul store`` share: how each is declared, finding the nodes, telling what came of it."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from cluster.asking import ASK_TIMEOUT_S, Answers, Found, StoreRef, ask, ask_own, find
from cluster.options import KeyOption, parse_size
from cluster.prompts import Blocks, Source, blocks_of
from cluster.rundir import ClusterFault, RunDir
from cluster.security.secrets import networks_here
from cluster.store.limits import parse_change
from tracehaul.rpc.peers import Peers
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import Reply, Request

R = TypeVar("R", bound=Reply)

err = Console(stderr=True)
out = Console()
PIPE_COLUMNS = 200
"""A pipe has no width to respect."""
ALL = ("url", "key", "run_dir")
"""Options of every command."""
BLOCKS = ("prompt", "chat", "tokens", "hashes", "salt")
"""Options of a command that is about blocks: exactly one of the first four."""


class Args(msgspec.Struct, frozen=True, kw_only=True):
    """All that commands may be told; a command without an option has its default."""

    trace: str = ""
    node: Annotated[str | None, typer.Argument(help="A store node, such as store-0. Default: all of them.")] = None
    count: Annotated[int, typer.Option(min=1, max=1000, help="Round trips to each.")] = 10
    prompt: Annotated[
        Path | None, typer.Option("--prompt", help="A text file, tokenized as /v1/completions does; - is stdin.")
    ] = None
    chat: Annotated[
        Path | None, typer.Option("--chat", help="A JSON list of messages, rendered as /v1/chat/completions does.")
    ] = None
    tokens: Annotated[Path | None, typer.Option("--tokens", help="A file of token ids; - is stdin.")] = None
    hashes: Annotated[list[str] | None, typer.Option("--hash", help="A block's hash in hex; may be repeated.")] = None
    salt: Annotated[str, typer.Option("--salt", help="The cache salt of the calls in question.")] = ""
    ttl_s: Annotated[float, typer.Option("--ttl", help="Seconds; the node caps it.")] = 600.0
    hard: Annotated[bool, typer.Option("--hard", help="Never evicted, rather than late.")] = False
    tenant: Annotated[str, typer.Option("--tenant", help="Whose; empty: no tenant's.")] = ""
    only: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's. Default: everybody's.")] = None
    cancel: Annotated[bool, typer.Option("--cancel", help="Let it serve as before.")] = False
    changes: Annotated[
        list[Any] | None,  # of Change
        typer.Option(
            "--set",
            parser=parse_change,
            metavar="NAME=VALUE",
            help="Change a limit now; may be repeated: all or none.",
        ),
    ] = None
    nbytes: Annotated[
        int | None,
        typer.Option(
            "--bytes", parser=parse_size, metavar="SIZE", help="At most so much of a node's free memory: 128MiB."
        ),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: answers and errors by node, as JSON.")] = False
    url: Annotated[str | None, typer.Option(help="Base URL of a cluster's API. Default: the one started here.")] = None
    key: KeyOption = None
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where the cluster's state and logs are.")] = Path(".run")


class Session(NamedTuple):
    """What a command works with."""

    args: Args
    refs: list[StoreRef]
    peers: Peers
    blocks: Blocks
    """Those that the command names, if it names any."""

    async def ask(self, request: Request, kind: type[R], timeout_s: float = ASK_TIMEOUT_S) -> Answers[R]:
        """The same question to each node; see :func:`cluster.asking.ask`."""
        return await ask(self.peers, self.refs, request, kind, timeout_s)

    async def ask_own(
        self, requests: Mapping[NodeId, Request], kind: type[R], timeout_s: float = ASK_TIMEOUT_S
    ) -> Answers[R]:
        """To each node its own question; see :func:`cluster.asking.ask_own`."""
        return await ask_own(self.peers, self.refs, requests, kind, timeout_s)


def as_answered(session: Session, got: Mapping[NodeId, Any]) -> Mapping[NodeId, Any]:
    """The replies themselves."""
    return got


class Command(msgspec.Struct, frozen=True):
    """A command: what it is told, how it asks the nodes, and how their answers are shown."""

    name: str
    help: str
    examples: Sequence[str]
    """Its command line after ``tracehaul store``."""
    work: Callable[[Session], Awaitable[Answers[Any]]]
    show: Callable[[Session, Answers[Any]], Iterable[Table | str]]
    """To a person."""
    options: Sequence[str] = ("node", "as_json")
    """Of :class:`Args`, in the order in which they are shown."""
    data: Callable[[Session, Mapping[NodeId, Any]], Mapping[NodeId, Any]] = as_answered
    """For ``--json``."""
    required: Mapping[str, str] = {}
    """Those of its options that are arguments and must be given, with their help."""

    def register(self, app: typer.Typer) -> None:
        """Make it known, as a function with the parameters that typer reads."""

        def entry(**given: Any) -> None:
            self.run(Args(**given))

        hints, defaults = get_type_hints(Args, include_extras=True), Args()
        parameters: list[inspect.Parameter] = []
        for name in (*self.options, *ALL):
            kind, default = hints[name], getattr(defaults, name)
            if name in self.required:
                kind, default = Annotated[str, typer.Argument(help=self.required[name])], inspect.Parameter.empty
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            )
        entry.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        title = "Examples:" if len(self.examples) > 1 else "Example:"
        text = "\n\n".join([self.help, title, *(f"  tracehaul store {example}" for example in self.examples)])
        app.command(self.name, help=text)(entry)

    def run(self, args: Args) -> None:
        """Find the cluster, the nodes and the blocks that are meant, ask, and tell what came of it.

        Raises:
            ClusterFault: not everything was done; the rest has been told.
        """
        found = find(args.url, RunDir(args.run_dir), args.key)
        if found.router_lost is not None:
            warning = f"tracehaul: {found.router_lost}. Asking the store nodes that were started here."
            err.print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)
        refs = found.select(args.node)
        session, answers = asyncio.run(self._asked(args, refs, self._blocks(args, found)))
        if args.as_json:
            shown = {"nodes": dict(self.data(session, answers.got)), "errors": answers.failed}
            typer.echo(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
        for part in self.show(session, answers) if not args.as_json else ():
            if isinstance(part, str):
                out.print(part, highlight=False, markup=False)
            else:
                (out if out.is_terminal else Console(width=PIPE_COLUMNS)).print(part)
        end(answers.failed)

    def _blocks(self, args: Args, found: Found) -> Blocks:
        if "hashes" not in self.options:
            return Blocks([], 0)
        return blocks_of(Source(args.prompt, args.chat, args.tokens, args.hashes or (), args.salt), found)

    async def _asked(self, args: Args, refs: list[StoreRef], blocks: Blocks) -> tuple[Session, Answers[Any]]:
        session = Session(args, refs, Peers(networks_here(RunDir(args.run_dir)).control), blocks)
        try:
            return session, await self.work(session)
        finally:
            await session.peers.close()


def end(failed: Mapping[NodeId, str]) -> None:
    """Raises ClusterFault if some node did not do its part: one line, exit code 1."""
    if failed:
        alike: dict[str, list[NodeId]] = {}
        for node, why in failed.items():
            alike.setdefault(why, []).append(node)
        raise ClusterFault("; ".join(f"{', '.join(nodes)} {why}" for why, nodes in alike.items()))
