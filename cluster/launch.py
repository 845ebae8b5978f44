"""Starts a cluster on this machine: a host like those of a fleet, with our own supervisor, which is asked in person.

Either every node is ready when this returns, or nothing of what it started still runs.
"""

import asyncio
import os
import secrets
import signal
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from cluster.api import here, make_operator_key
from cluster.config import ClusterConfig, PoolConfig, pools_of, store_config
from cluster.hosts.asks import Stranger, supervisor_pid
from cluster.hosts.managers import Manager, present
from cluster.hosts.orders import HostReport, NodeReport, order_of
from cluster.hosts.own import OwnSupervisor, end_nodes
from cluster.hosts.supervise import NAME as SUPERVISOR
from cluster.memory import Available, needs, shortage
from cluster.model import kv_layout, model_size, note, stock_layout
from cluster.plan import NodeSpec, Plan, PoolPlan, fleet_name, load_plan, nodes_of
from cluster.processes import alive, nodes_running, stop
from cluster.rundir import FAULT_EXIT, CannotWrite, ClusterFault, RunDir
from cluster.security.config import SecurityConfig
from router.fleet.members import NodeStatus
from router.http.access import KeysOnDisk
from router.http.keys import BadKeys
from router.http.tls import certificate_of
from tracehaul.model.source import SourceError, resolve
from tracehaul.runtime import clock
from tracehaul.runtime.ports import free_port
from tracehaul.transfer.memory import available_memory

LAUNCHER = "up"
"""Name under which the launching process itself is noted, so that ``down`` can stop a launch."""
ROLLBACK_GRACE_S = 5.0
POLL_S = 0.1
ASK_S = 1.0
"""How often the router is asked who serves, while nodes do not say it themselves."""
ASK_TIMEOUT_S = 2.0
LOG_LINES = 12


def up(config: ClusterConfig, run: RunDir, console: Console) -> list[str]:
    """Starts the cluster that ``config`` describes; returns the names that clients call its models by.

    Raises:
        ClusterFault: it cannot be started; nothing of it is left running.
    """
    run.create()
    own = OwnSupervisor(run)
    with run.lock():
        if not isinstance(_manager(run), OwnSupervisor):
            raise ClusterFault(f"systemd runs the nodes of {run.path}; end that with: tracehaul down")
        if supervisor_pid(run) is None and nodes_running(run.plan_file):
            plan = load_plan(run)
            console.print("The cluster that runs here had no supervisor; it goes on as it was started.")
            report = own.apply(order_of(plan))
            asyncio.run(_wait_ready(plan, run, own, report, {}, console))
            return [pool.model.name for pool in plan.pools]
        refuse_if_running(run)
        for said in run.torn():  # of nobody who runs, or that would be known
            console.print(f"{said}; it is removed", highlight=False, markup=False, soft_wrap=True)
        own.leave()
        run.clear()
        run.record(LAUNCHER, os.getpid())
        try:
            check_port(config)
            check_access(config)
            own.begin()  # it gets ready while we plan
            plan = make_plan(config, console)
            if config.api.keys_file:
                make_operator_key(run)
            for said in filter(None, (note(pool.model) for pool in plan.pools)):
                console.print(said, highlight=False, markup=False, soft_wrap=True)
            if config.security != SecurityConfig():
                from cluster.security.laying import secure

                secure(plan, run, now_s=clock.wall_s())
            asyncio.run(_start(plan, own, run, console))
        except BaseException:
            with suppress(Stranger):  # which has none of our nodes
                own.leave()
            end_nodes(run, [spec.name for spec in nodes_of(config)], grace_s=ROLLBACK_GRACE_S)
            run.clear()
            raise
        finally:
            run.forget(LAUNCHER)
    return [pool.model.name for pool in plan.pools]


def _manager(run: RunDir) -> Manager:
    """Who supervises here; our own where that cannot be read."""
    try:
        return present(run)
    except ClusterFault:
        return OwnSupervisor(run)


def down(run: RunDir, tell: Callable[[str], None] = lambda line: None) -> tuple[list[str], list[str]]:
    """Stops everything that runs of ``run`` and forgets it; logs stay. Harmless if nothing runs.

    The launcher goes first (it takes back what it started), then who would start again what is stopped, then the
    router, so that no new work arrives, then those who compute, then whatever else was noted. Returns the names of what
    was stopped, and of what had to be killed. ``tell`` gets a line for each note that could not be read or removed,
    which keeps nothing running.

    Raises:
        ClusterFault: somebody else has the supervisor's name, which leaves our nodes stopped all the same; or the nodes
            are another user's.
    """
    try:
        grace_s = load_plan(run).config.drain_timeout_s + ROLLBACK_GRACE_S
    except ClusterFault:  # it stopped before it had a plan, or the plan is from another version
        grace_s = ClusterConfig().drain_timeout_s + ROLLBACK_GRACE_S
    for line in run.torn():
        tell(line)
    stopped: list[str] = []
    killed = stop([r for r in run.records() if r.name == LAUNCHER and alive(r)], grace_s=grace_s)
    manager = _manager(run)
    if not isinstance(manager, OwnSupervisor):
        stopped += [node.name for node in manager.status().nodes if node.pid is not None]
        manager.stop(())
    supervised, another = False, None
    try:
        supervised = OwnSupervisor(run).leave()
    except Stranger as fault:
        another = fault
    try:
        for found, all_ in zip(end_nodes(run, grace_s=grace_s), (stopped, killed), strict=True):
            all_ += found
    except PermissionError as error:
        raise another or ClusterFault(f"the nodes of {run.path} are another user's") from error
    for line in run.clear():
        tell(line)
    if another is not None:
        raise another
    return stopped or [SUPERVISOR] * supervised, killed


def restart(run: RunDir, names: Sequence[str], console: Console) -> None:
    """Stops these nodes and starts them anew, the dead ones too; returns when they serve again.

    From when they are stopped on, nothing that the run directory refuses leaves them so.

    Raises:
        ClusterFault: no cluster runs here, a name is not in its plan, nothing can be written here (then nothing is
            stopped), or a node does not come up.
    """
    plan = load_plan(run)
    for name in names:
        plan.node(name)
    manager = _manager(run)
    try:
        with run.lock():
            before = _listed(plan, run) or {}
            if isinstance(manager, OwnSupervisor) and supervisor_pid(run) is None and not run.host_file.exists():
                manager.apply(order_of(plan))  # who goes on with nothing follows nobody
            report = manager.restart(names)
            chosen = msgspec.structs.replace(report, nodes=tuple(n for n in report.nodes if n.name in names))
            asyncio.run(_wait_ready(plan, run, manager, chosen, before, console))
    except CannotWrite as fault:
        raise ClusterFault(f"{fault}; nothing was stopped") from fault


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
    layouts = [
        (kv_layout if pool.config.engine == "native" else stock_layout)(pool.model, pool.config.dtype or config.dtype)
        for pool in pools
    ]
    store = store_config(config, layouts)
    placed = nodes_of(config, free_port()) if nodes is None else nodes
    if nodes is None:
        check_memory(config, placed, pools, store.slot_bytes)
    return Plan(
        config=config,
        pools=tuple(pools),
        store=store,
        nodes=placed,
        name=secrets.token_hex(4) if nodes is None else fleet_name(config, nodes),
    )


def _plan_pool(name: str, pool: PoolConfig, console: Console) -> PoolPlan:
    foreign = pool.engine != "native"
    try:
        if console.is_terminal:
            with console.status("looking for the model") as status:
                source = resolve(pool.model, progress=status.update, foreign=foreign)
        else:
            source = resolve(
                pool.model, progress=lambda line: console.print(line, highlight=False, markup=False), foreign=foreign
            )
    except SourceError as error:
        raise ClusterFault(str(error)) from error
    if Path(pool.model).exists():  # nodes run elsewhere
        pool = msgspec.structs.replace(pool, model=str(source.path.absolute()))
    return PoolPlan(name, msgspec.structs.replace(source, name=pool.serves or source.name), pool)


def check_memory(config: ClusterConfig, nodes: Sequence[NodeSpec], pools: Sequence[PoolPlan], slot_bytes: int) -> None:
    """Raises ClusterFault if the nodes together do not fit here: better said now than by the last one to start."""
    sizes = {pool.name: model_size(pool.model, pool.config, config.dtype) for pool in pools}
    on_gpu = config.device == "cuda" or (config.device == "auto" and Path("/dev/nvidiactl").exists())
    asked = needs(config, nodes, pools, sizes, staging_bytes=slot_bytes, on_gpu=on_gpu)
    if line := shortage(asked, Available(*available_memory())):
        raise ClusterFault(line)


async def _start(plan: Plan, own: OwnSupervisor, run: RunDir, console: Console) -> None:
    """Has all nodes started and waits until they are ready."""
    loop = asyncio.get_running_loop()
    me = asyncio.current_task()
    assert me is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, me.cancel)
    try:
        for spec in plan.nodes:
            run.log(spec.name).unlink(missing_ok=True)
        report = await asyncio.to_thread(own.apply, order_of(plan))
        await _wait_ready(plan, run, own, report, {}, console)
    except asyncio.CancelledError as error:
        raise ClusterFault("interrupted: everything that was started is stopped again") from error


async def _wait_ready(
    plan: Plan, run: RunDir, manager: Manager, began: HostReport, before: Mapping[str, int], console: Console
) -> None:
    """Returns when the API answers and lists the nodes of ``began``, in another life than ``before``; raises when one
    of them ends.

    What a node says of itself in the run directory counts too, for as long as that can be written.
    """
    began_s = asked_s = clock.now_s()
    end_s = began_s + plan.config.start_timeout_s
    lives_ended = {node.name: node.restarts for node in began.nodes}
    report = began
    with _progress(console) as progress:
        while clock.now_s() < end_s:
            nodes = [node for node in report.nodes if node.name in lives_ended]
            progress.show({node.name: node.phase or node.state for node in nodes}, clock.now_s() - began_s)
            if report.supervisor == "none":
                raise ClusterFault(f"the supervisor has ended; why is in {run.log(SUPERVISOR)}")
            for node in nodes:
                if (node.pid is None and node.state != "starting") or node.restarts > lives_ended[node.name]:
                    raise _exited(run, node)
            said = all(node.phase == "ready" for node in nodes)
            if said or clock.now_s() - asked_s >= ASK_S:
                lives = await asyncio.to_thread(_listed, plan, run)
                asked_s = clock.now_s()
                serves = lives is not None and all(
                    node.role == "router" or lives.get(node.name, before.get(node.name)) != before.get(node.name)
                    for node in nodes
                )
                if serves and (said or not run.is_writable()):
                    return
            await asyncio.sleep(POLL_S)
            report = await asyncio.to_thread(manager.status)
    raise ClusterFault(f"not ready within {plan.config.start_timeout_s:.0f} s; logs are in {run.path / 'logs'}")


def _listed(plan: Plan, run: RunDir) -> dict[str, int] | None:
    """The lives of those that the router gives work to, by their names; None: it does not answer."""
    try:
        with here(plan, run).client(ASK_TIMEOUT_S) as client:
            answer = client.get("/cluster")
        if answer.status_code == 200:
            statuses = msgspec.json.decode(answer.content, type=list[NodeStatus])
            return {status.info.node: status.info.generation for status in statuses if status.health == "ready"}
    except (httpx.HTTPError, msgspec.DecodeError):
        pass
    return None


def _exited(run: RunDir, node: NodeReport) -> ClusterFault:
    """What to say of a node that ended before it was ready."""
    name, code = node.name, node.exit_code
    lines = run.log_tail(name, LOG_LINES)
    if code == FAULT_EXIT and lines:
        return ClusterFault(f"{name}: {lines[-1]}")
    how = f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with code {code}"
    if code == -signal.SIGKILL:
        how += " (out of memory, perhaps)"
    tail = "".join(f"\n  {line}" for line in lines)
    return ClusterFault(f"{name} {how} before it was ready; the end of {run.log(name)}:{tail}")


class _Progress:
    """Shows how far each node is: a live table on a terminal, else a line per change."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._shown: dict[str, str] = {}
        self._spinners: dict[str, Spinner] = {}

    def show(self, phases: Mapping[str, str], elapsed_s: float) -> None:
        """Update with how far the nodes are now."""
        if self._live is None:
            for name, phase in phases.items():
                if self._shown.get(name) != phase:
                    self._shown[name] = phase
                    self._console.print(f"{elapsed_s:5.1f}s  {name}: {phase}", highlight=False)
            return
        table = Table.grid(padding=(0, 2))
        for name, phase in phases.items():
            spinner = self._spinners.setdefault(name, Spinner("dots"))
            table.add_row("[green]✓[/]" if phase == "ready" else spinner, name, f"[dim]{phase}[/]")
        table.add_row("", f"[dim]{elapsed_s:.0f}s[/]", "")
        self._live.update(table)


@contextmanager
def _progress(console: Console) -> Generator[_Progress, None, None]:
    if not console.is_terminal:
        yield _Progress(console, None)
        return
    with Live(console=console, refresh_per_second=10) as live:
        yield _Progress(console, live)
