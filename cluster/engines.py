"""Workers over stock servers, as nodes of a cluster: which server, where, with which options."""

import asyncio
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from cluster.directory.opening import open_directory
from cluster.plan import NodeSpec, Plan, PoolPlan
from cluster.rundir import ClusterFault, RunDir
from cluster.security.secrets import FOLDER, TOKEN_FILE
from engines.adapter.child import Child
from engines.adapter.config import AdapterConfig
from engines.adapter.dialect import Dialect, Facts
from engines.adapter.seat import StockSeat
from engines.adapter.selftest import Unequal, prove, timed
from engines.adapter.server import StockServer
from engines.adapter.thinking import Marks
from engines.adapter.watch import known
from engines.sglang.adapter import SGLang
from engines.vllm.adapter import VLLM
from router.calls.reasoning import CLOSE, OPEN
from tracehaul.model.revision import revision
from tracehaul.model.source import ModelSource, SourceError
from tracehaul.model.text import Text
from tracehaul.rpc.member import Member
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.ports import free_port
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.hashing import KVLayout
from worker.config import WorkerConfig

log = Log(__name__)

EngineName = Literal["native", "sglang", "vllm"]
POLL_S = 0.25
SCHEDULING = "--scheduling-policy"
"""vLLM's option; a worker starts its own server with ``priority``."""
LAYOUT_FILE = "TRACEHAUL_LAYOUT_FILE"
"""In a server's environment: where its plugin writes the layout of its blocks, as JSON, before it shares any."""
LAYOUT_TIMEOUT_S = 10.0
LOG_BYTES = 16384
LINE_CHARACTERS = 300
ERROR_LINE = re.compile(r"\b(\w*(Error|Refused)|error): ")
"""What Python and its parsers of options write when they give up."""


def dialect_of(engine: EngineName, args: tuple[str, ...], ends: Sequence[int] = (), *, started: bool) -> Dialect:
    """How a server of that engine, whose model has these end tokens, is spoken to that was started with these options,
    by its worker or by others."""
    if engine == "sglang":
        return SGLang(ends)
    policies = [word for before, word in pairwise(args) if before == SCHEDULING]
    policies += [arg.partition("=")[2] for arg in args if arg.startswith(f"{SCHEDULING}=")]
    return VLLM(priorities="priority" in policies or (started and not policies))


async def stock_seat(
    stack: AsyncExitStack,
    info: NodeInfo,
    plan: Plan,
    spec: NodeSpec,
    run: RunDir,
    peers: Peers,
    tell: Callable[..., None],
) -> Member:
    """A worker over a server, which is started if there is none to attach to; ``stack`` ends both.

    Raises:
        ClusterFault: the server cannot be started, does not answer, or is not what the plan says.
    """
    pool = plan.pool(spec.pool)
    config, limits = pool.config, pool.config.worker or plan.config.worker
    url = config.attach.get(spec.name)
    ends, marks = await asyncio.to_thread(_tokens, pool.model)
    dialect = dialect_of(config.engine, config.engine_args, ends, started=url is None)
    file = layout_file(run, spec.name, started=url is None)
    child: Child | None = None
    if url is None:
        if limits.use_store:
            await _told_of_routers(stack, plan, spec, run)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        child = await _started(plan, spec, dialect, run, port, file, limits)
        stack.push_async_callback(child.stop)
        tell(phase="loading model")
    server = StockServer(url)
    stack.push_async_callback(server.aclose)
    facts = await _answering(server, dialect, child, config.adapter, run.log(f"{spec.name}-server"))
    if child is None:
        check_model(url, facts, pool)
    layout = await _layout(file, child) if limits.use_store else None
    if layout is not None:
        await _prove(server, dialect, facts, config.adapter)
    log.info("a server answers", engine=dialect.name, url=url, shares=layout is not None, **facts._asdict())
    info = msgspec.structs.replace(info, model=pool.model.name)
    seat = StockSeat(
        info, server, dialect, facts, layout, peers, limits, config.adapter, marks=marks, ends=child is not None
    )
    stack.push_async_callback(seat.aclose)
    await _time(server, dialect, facts, seat)
    member = seat.member
    return member if child is None else member._replace(background=(*member.background, child.ended))


def layout_file(run: RunDir, name: str, *, started: bool) -> Path:
    """Where that worker's server tells its layout. What one that was started has left is not one's that is attached."""
    return run.path / f"{name}{'-server' if started else ''}.layout.json"


def routers_file(run: RunDir, name: str) -> Path:
    """Where that worker tells the plugin of the server that it started of the routers, as they are found now."""
    return run.path / f"{name}-server.routers.json"


def write_routers(file: Path, routers: tuple[str, ...]) -> None:
    """Whoever reads the file finds it whole."""
    made = file.with_suffix(".new")
    try:
        made.write_bytes(msgspec.json.encode(routers))
        made.replace(file)
    except OSError as error:
        log.warning("a server's plugin is not told of the routers", file=file, reason=error)


def check_model(url: str, facts: Facts, pool: PoolPlan) -> None:
    """Raises ClusterFault if the server there, which somebody else has started, is of another model than the pool."""
    name = pool.model.name
    if {facts.model, facts.path.rstrip("/")}.isdisjoint({name, pool.config.model.rstrip("/"), str(pool.model.path)}):
        raise ClusterFault(
            f"{url} serves {facts.model!r} from {facts.path}, and not {name!r}: attach a server of that model, or if "
            f"it is one, start it with --served-model-name {name}"
        )


async def _told_of_routers(stack: AsyncExitStack, plan: Plan, spec: NodeSpec, run: RunDir) -> None:
    """The server's plugin is told where routers are for as long as ``stack`` lives, as its worker is."""
    file = routers_file(run, spec.name)
    await asyncio.to_thread(file.unlink, missing_ok=True)
    tasks = await stack.enter_async_context(Tasks("a server's routers"))
    tasks.start(open_directory(plan, run).follow(partial(write_routers, file)), "follow")


async def _started(
    plan: Plan, spec: NodeSpec, dialect: Dialect, run: RunDir, port: int, file: Path, limits: WorkerConfig
) -> Child:
    pool = plan.pool(spec.pool)
    config = pool.config
    args: list[str] = []
    if limits.use_store:
        await asyncio.to_thread(file.unlink, missing_ok=True)
        args = dialect.sharing({"tracehaul": await _plugin(plan, spec, run)})
    dtype = ["--dtype", config.dtype or plan.config.dtype]
    command = dialect.command(str(pool.model.path), pool.model.name, port, [*dtype, *args, *config.engine_args])
    environment = {**dialect.environment, LAYOUT_FILE: str(file)}
    path = run.log(f"{spec.name}-server")
    python = config.engine_python or sys.executable
    log.info("a server is started", command=" ".join([python, *command]), log=path)
    try:
        return await Child.start([python, *command], environment, path, config.adapter.stop_timeout_s)
    except OSError as error:
        raise ClusterFault(f"cannot start {dialect.name} with {python}: {error}") from error


async def _plugin(plan: Plan, spec: NodeSpec, run: RunDir) -> dict[str, object]:
    """What the server's plugin is told: see engines/blocks/config.py."""
    source, security = plan.pool(spec.pool).model, plan.config.security
    secrets = run.path / FOLDER
    return {
        "routers": plan.routers,
        "routers_file": str(routers_file(run, spec.name)),
        "name": f"{spec.name}+engine",
        "revision": await asyncio.to_thread(revision, source),
        "model": source.name,
        "pool": spec.pool,
        "cluster": plan.name,
        "transports": plan.transports,
        "listen": spec.data.listen,
        "secrets": str(secrets) if security.control == "mtls" else "",
        "data": security.data if security.control == "mtls" and security.proves_data else "plain",
        "token_file": str(secrets / TOKEN_FILE) if security.token else "",
    }


async def _answering(
    server: StockServer, dialect: Dialect, child: Child | None, config: AdapterConfig, path: Path
) -> Facts:
    """What it is, once it answers."""
    until_s = clock.now_s() + config.start_timeout_s
    while True:
        try:
            await server.get(dialect.alive_path, config.answer_timeout_s)
            if dialect.deep_path is not None:
                await server.get(dialect.deep_path, config.stall_timeout_s)
            return await known(server, dialect, config.answer_timeout_s)
        except ClusterError as error:
            if child is not None and child.code is not None:
                said = await asyncio.to_thread(_last_words, path)
                raise ClusterFault(
                    f"{dialect.name} has ended with code {child.code}{said}; its log is {path}"
                ) from error
            if clock.now_s() >= until_s:
                raise ClusterFault(f"{dialect.name} does not answer at {server.url}: {error}") from error
        await asyncio.sleep(POLL_S)


def _tokens(source: ModelSource) -> tuple[tuple[int, ...], Marks]:
    """Its end tokens, and those around its reasoning; none where its files are not on this host."""
    try:
        text = Text.load(source)
    except SourceError:
        return (), Marks()

    def one(mark: str) -> int | None:
        tokens = text.encode(mark)
        return tokens[0] if len(tokens) == 1 else None

    return text.eos_tokens, Marks(one(OPEN), one(CLOSE))


def _last_words(log: Path) -> str:
    """Why a server has ended, as far as its log's last lines say it: an error of its own, or of its options."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if ERROR_LINE.search(line)]
    return f": {said[-1][:LINE_CHARACTERS]}" if said else ""


async def _prove(server: StockServer, dialect: Dialect, facts: Facts, config: AdapterConfig) -> None:
    """Raises ClusterFault if its answers from blocks of the store are not those that it computes."""
    try:
        if not await prove(server, dialect, facts, config.stored_timeout_s):
            log.warning("answers from the store were not compared: no block came back from it", url=server.url)
    except Unequal as why:
        raise ClusterFault(
            f"{dialect.name} at {server.url} does not answer from blocks of the store as it does by itself ({why}): "
            "its KV cannot be shared; say use_store = false in [pools.NAME.worker]"
        ) from None
    except ClusterError as error:
        raise ClusterFault(f"{dialect.name} at {server.url} failed its self-test: {error}") from error


async def _time(server: StockServer, dialect: Dialect, facts: Facts, seat: StockSeat) -> None:
    """Know its speed before it is given work: of two servers the one that nothing is known of would have all of it."""
    try:
        figures = await timed(server, dialect, facts)
    except ClusterError as error:
        log.warning("a server's speed is assumed: it was not measured", url=server.url, reason=str(error))
        return
    if figures is None:
        log.warning("a server's speed is assumed: it does not say what it has computed", url=server.url)
        return
    seat.watch.pace.begin(*figures)
    log.info("a server's speed", url=server.url, token_s=seat.watch.pace.rates.token_s)


async def _layout(file: Path, child: Child | None) -> KVLayout | None:
    """Of the blocks that its plugin shares, as the plugin has written it; None: it shares none.

    A server that runs elsewhere, or without the plugin, writes none: then its worker's blocks are its own.
    """
    until_s = clock.now_s() + (LAYOUT_TIMEOUT_S if child is not None else 0.0)
    while True:
        try:
            return msgspec.json.decode(await asyncio.to_thread(file.read_bytes), type=KVLayout)
        except FileNotFoundError:
            if clock.now_s() >= until_s:
                log.warning("the engine's server shares no blocks: its plugin has not said their layout", file=file)
                return None
        except (OSError, msgspec.MsgspecError) as error:
            raise ClusterFault(f"cannot read the layout {file}: {error}") from error
        await asyncio.sleep(POLL_S)
