"""Starts a cluster: one process per node, each in a session of its own, and waits until it can serve.

Either every node is ready when this returns, or nothing of what it started still runs.
"""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from cluster.api import here, make_operator_key
from cluster.config import ROUTER, ClusterConfig, PoolConfig, pools_of, store_config
from cluster.hosts.managers import present
from cluster.model import kv_layout, note
from cluster.plan import NodeSpec, Plan, PoolPlan, fleet_name, load_plan, nodes_of, save_plan
from cluster.rundir import FAULT_EXIT, ClusterFault, NodeState, Phase, ProcessRecord, RunDir, alive, stop
from cluster.security.config import SecurityConfig
from router.http.access import KeysOnDisk
from router.http.keys import BadKeys
from router.http.tls import certificate_of
from tracehaul.model.source import SourceError, resolve
from tracehaul.runtime import clock
from tracehaul.transfer.memory import available_bytes
from tracehaul.wire.hashing import KVLayout

LAUNCHER = "up"
"""Name under which the launching process itself is noted, so that ``down`` can stop a launch."""
ROLLBACK_GRACE_S = 5.0
POLL_S = 0.1
LOG_LINES = 12


def up(config: ClusterConfig, run: RunDir, console: Console) -> list[str]:
    """Starts the cluster that ``config`` describes; returns the names that clients call its models by.

    Raises:
        ClusterFault: it cannot be started; nothing of it is left running.
    """
    run.create()
    with run.lock():
        refuse_if_running(run)
        run.clear()
        run.record(LAUNCHER, os.getpid())
        try:
            check_port(config)
            check_access(config)
            if config.api.keys_file:
                make_operator_key(run)
            plan = make_plan(config, console)
            for said in filter(None, (note(pool.model) for pool in plan.pools)):
                console.print(said, highlight=False, markup=False, soft_wrap=True)
            save_plan(run, plan)
            if config.security != SecurityConfig():
                from cluster.security.laying import secure

                secure(plan, run, now_s=clock.wall_s())
            asyncio.run(_start(plan, run, console))
        finally:
            run.forget(LAUNCHER)
    return [pool.model.name for pool in plan.pools]


def down(run: RunDir) -> tuple[list[str], list[str]]:
    """Stops everything noted in ``run`` and forgets it; logs stay. Harmless if nothing runs.

    The launcher goes first (it takes back what it started), then the router, so that no new work arrives, then
    those who compute, then whatever else was noted. Returns the names of what was stopped, and of what had to be
    killed.
    """
    try:
        grace_s = load_plan(run).config.drain_timeout_s + ROLLBACK_GRACE_S
    except ClusterFault:  # it stopped before it had a plan, or the plan is from another version
        grace_s = ClusterConfig().drain_timeout_s + ROLLBACK_GRACE_S
    stopped: list[str] = []
    killed: list[str] = []
    if run.host_file.exists():  # else its supervisor would start again what is stopped here
        stopped += [node.name for node in present(run).status().nodes if node.pid is not None]
        present(run).stop(())
        run.host_file.unlink(missing_ok=True)
    for stage in ((LAUNCHER,), ("router",), ("decode", "prefill"), ("",)):
        running = [r for r in run.records() if r.name.startswith(stage) and alive(r)]
        killed += stop(running, grace_s=grace_s)
        stopped += [r.name for r in running]
    run.clear()
    return stopped, killed


def restart(run: RunDir, names: Sequence[str], console: Console) -> None:
    """Stops these nodes and starts them anew, the dead ones too; returns when they serve again.

    Raises:
        ClusterFault: no cluster runs here, a name is not in its plan, or a node does not come up.
    """
    plan = load_plan(run)
    specs = [plan.node(name) for name in dict.fromkeys(names)]
    with run.lock():
        grace_s = plan.config.drain_timeout_s + ROLLBACK_GRACE_S
        stop([record for record in run.records() if record.name in names and alive(record)], grace_s=grace_s)
        asyncio.run(_start_again(plan, run, specs, console))


def refuse_if_running(run: RunDir) -> None:
    """Raises ClusterFault if any process noted in ``run`` is alive."""
    running = [record.name for record in run.records() if alive(record)]
    if running:
        raise ClusterFault(
            f"a cluster already runs in {run.path} ({', '.join(running)}). "
            "See it with: tracehaul status. Stop it with: tracehaul down"
        )


def check_port(config: ClusterConfig) -> None:
    """Raises ClusterFault if the API's port cannot be had."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
    except OSError as error:
        raise ClusterFault(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}); choose another with --port or --host"
        ) from error


def check_access(config: ClusterConfig) -> None:
    """Raises ClusterFault if the keys or the certificate cannot be read: better said now than by the router."""
    api = config.api
    try:
        if api.keys_file:
            KeysOnDisk(Path(api.keys_file))
    except BadKeys as error:
        raise ClusterFault(f"{api.keys_file} holds no keys: {error}") from error
    except OSError as error:
        hint = f"make one with: tracehaul keys add --keys {api.keys_file}"
        raise ClusterFault(f"cannot read the keys {api.keys_file} ({error.strerror}); {hint}") from error
    try:
        certificate_of(api)
    except OSError as error:  # of which errors of TLS are some
        files = " and ".join(filter(None, (api.tls_cert, api.tls_key)))
        raise ClusterFault(f"cannot use the certificate in {files}: {error}") from error


def make_plan(config: ClusterConfig, console: Console, nodes: tuple[NodeSpec, ...] | None = None) -> Plan:
    """Decides what is open in ``config``: fetches the model if it is not here, and picks addresses and sizes.

    ``nodes``: those of a fleet; None: all run on this machine.

    Raises:
        ClusterFault: the model cannot be had, or the arenas do not fit.
    """
    pools = [_plan_pool(name, pool, console) for name, pool in pools_of(config).items()]
    layouts = [kv_layout(pool.model, pool.config.dtype or config.dtype) for pool in pools]
    if nodes is None:
        check_memory(config, layouts)
    return Plan(
        config=config,
        pools=tuple(pools),
        store=store_config(config, layouts),
        nodes=nodes_of(config, free_port()) if nodes is None else nodes,
        name=secrets.token_hex(4) if nodes is None else fleet_name(config, nodes),
    )


def _plan_pool(name: str, pool: PoolConfig, console: Console) -> PoolPlan:
    try:
        if console.is_terminal:
            with console.status("looking for the model") as status:
                source = resolve(pool.model, progress=status.update)
        else:
            source = resolve(pool.model, progress=lambda line: console.print(line, highlight=False, markup=False))
    except SourceError as error:
        raise ClusterFault(str(error)) from error
    if Path(pool.model).exists():  # nodes run elsewhere
        pool = msgspec.structs.replace(pool, model=str(source.path.absolute()))
    return PoolPlan(name, msgspec.structs.replace(source, name=pool.serves or source.name), pool)


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_memory(config: ClusterConfig, layouts: Sequence[KVLayout]) -> None:
    """Raises ClusterFault if the arenas together cannot fit: better said now than by the last node to start.

    ``layouts``: one for each of the pools.
    """
    kv_bytes = 0
    for pool, layout in zip(pools_of(config).values(), layouts, strict=True):
        if config.device != "cuda":
            kv_bytes += (pool.prefill + pool.decode) * (pool.kv_tokens or config.kv_tokens) * layout.token_bytes
    store_bytes = config.nodes.store * config.store_bytes
    available = available_bytes()
    if kv_bytes + store_bytes > available:
        gib = 2**30
        raise ClusterFault(
            f"not enough memory: {store_bytes / gib:.1f} GiB for stores and {kv_bytes / gib:.1f} GiB for workers' KV "
            f"asked, {available / gib:.1f} GiB available; lower --store-bytes or --kv-tokens"
        )


async def _start(plan: Plan, run: RunDir, console: Console) -> None:
    """Starts all nodes and waits until they are ready; on any failure stops all of them again."""
    loop = asyncio.get_running_loop()
    me = asyncio.current_task()
    assert me is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, me.cancel)
    children: dict[str, subprocess.Popen[bytes]] = {}
    records: list[ProcessRecord] = []
    try:
        for spec in plan.nodes:
            run.log(spec.name).unlink(missing_ok=True)
            children[spec.name] = _spawn(spec, run)
            records.append(run.record(spec.name, children[spec.name].pid))
        async with asyncio.timeout(plan.config.start_timeout_s):
            await _wait_ready(plan, run, children, console)
    except BaseException as error:
        stop(records, grace_s=ROLLBACK_GRACE_S)
        for child in children.values():
            child.wait()
        run.clear()
        if isinstance(error, TimeoutError):
            raise ClusterFault(
                f"not ready within {plan.config.start_timeout_s:.0f} s; logs are in {run.path / 'logs'}"
            ) from error
        if isinstance(error, asyncio.CancelledError):
            raise ClusterFault("interrupted: everything that was started is stopped again") from error
        raise


async def _start_again(plan: Plan, run: RunDir, specs: Sequence[NodeSpec], console: Console) -> None:
    children: dict[str, subprocess.Popen[bytes]] = {}
    for spec in specs:
        run.write_state(spec.name, NodeState("starting"))
        children[spec.name] = _spawn(spec, run)
        run.record(spec.name, children[spec.name].pid)
    try:
        async with asyncio.timeout(plan.config.start_timeout_s):
            await _wait_ready(plan, run, children, console)
    except TimeoutError as error:
        raise ClusterFault(f"not ready within {plan.config.start_timeout_s:.0f} s") from error


def _spawn(spec: NodeSpec, run: RunDir) -> subprocess.Popen[bytes]:
    """One node's process. It leads a session, so that a Ctrl-C at this terminal does not reach it.

    Its log goes on where that of its last life ended: why that one died is worth knowing.
    """
    command = [sys.executable, "-m", "cluster.cli", "node", spec.name, "--config", str(run.plan_file)]
    with run.log(spec.name).open("ab") as log:
        return subprocess.Popen(
            command, cwd=run.path, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


async def _wait_ready(plan: Plan, run: RunDir, children: dict[str, subprocess.Popen[bytes]], console: Console) -> None:
    """Returns when every node says that it is ready and the API answers; raises when one exits."""
    began_s = clock.now_s()
    with _progress(console) as progress:
        while True:
            states = {name: run.state(name) for name in children}
            progress.show(states, clock.now_s() - began_s)
            for name, child in children.items():
                if (code := child.poll()) is not None:
                    raise _exited(run, name, code)
            if all(state.phase == "ready" for state in states.values()):
                break
            await asyncio.sleep(POLL_S)
    with here(plan, run).client(timeout_s=2.0) as client:
        while True:
            try:
                answer = await asyncio.to_thread(client.get, "/cluster")
                if answer.status_code == 200:
                    members = {node["info"]["node"] for node in answer.json()}
                    if all(name in members or name == ROUTER for name in children):
                        return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(POLL_S)


def _exited(run: RunDir, name: str, code: int) -> ClusterFault:
    """What to say of a node that ended before it was ready."""
    lines = run.log_tail(name, LOG_LINES)
    if code == FAULT_EXIT and lines:
        return ClusterFault(f"{name}: {lines[-1]}")
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    if code == -signal.SIGKILL:
        how += " (out of memory, perhaps)"
    tail = "".join(f"\n  {line}" for line in lines)
    return ClusterFault(f"{name} {how} before it was ready; the end of {run.log(name)}:{tail}")


class _Progress:
    """Shows how far each node is: a live table on a terminal, else a line per change."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._shown: dict[str, Phase] = {}
        self._spinners: dict[str, Spinner] = {}

    def show(self, states: dict[str, NodeState], elapsed_s: float) -> None:
        """Update with the nodes' states of now."""
        if self._live is None:
            for name, state in states.items():
                if self._shown.get(name) != state.phase:
                    self._shown[name] = state.phase
                    self._console.print(f"{elapsed_s:5.1f}s  {name}: {state.phase}", highlight=False)
            return
        table = Table.grid(padding=(0, 2))
        for name, state in states.items():
            spinner = self._spinners.setdefault(name, Spinner("dots"))
            table.add_row("[green]✓[/]" if state.phase == "ready" else spinner, name, f"[dim]{state.phase}[/]")
        table.add_row("", f"[dim]{elapsed_s:.0f}s[/]", "")
        self._live.update(table)


@contextmanager
def _progress(console: Console) -> Generator[_Progress, None, None]:
    if not console.is_terminal:
        yield _Progress(console, None)
        return
    with Live(console=console, refresh_per_second=10) as live:
        yield _Progress(console, live)
