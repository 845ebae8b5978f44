"""Our own supervisor: one process per run directory that starts a host's nodes, and starts them again when they die.

It outlives the command and the login that began it. Its nodes outlive it: a new supervisor finds those that run, and
follows them on. It is told to end, and ends them first, by SIGTERM or by being asked to stop all.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from cluster.config import Role
from cluster.hosts.asks import (
    LINE_BYTES_MAX,
    Answer,
    Apply,
    Ask,
    Leave,
    Refused,
    Restart,
    Status,
    Stop,
    Told,
    address,
    decode_ask,
    encode,
    may_ask,
)
from cluster.hosts.changes import changes
from cluster.hosts.kept import ENVIRONMENT_FILE, Kept, chosen, digests_here, load, node_command, release, save
from cluster.hosts.lives import KILL_WAIT_S, Launch, Lives
from cluster.hosts.logs import keep_small
from cluster.hosts.orders import HostReport, Order, environment, role_of, stages, variables
from cluster.plan import NodeSpec, save_plan
from cluster.processes import alive
from cluster.rundir import ClusterFault, RunDir
from tracehaul import __version__
from tracehaul.runtime.log import Log, setup

log = Log(__name__)

NAME = "supervisor"
GRACE_S = 5.0
"""A node that is told to stop has this beside its drain."""
LOOK_S = 5.0
"""Between looks at how large the logs are, and whether it is needed."""
ASKED_TIMEOUT_S = 10.0
"""For whoever connects to say what it wants."""


def supervise(run: RunDir, order: Order | None = None) -> None:
    """Be the supervisor of ``run`` until told to stop. ``order``: None: what was ordered before, if anything was.

    Raises:
        ClusterFault: there is one already.
    """
    setup(NAME)
    asyncio.run(Supervised(run).serve(order))


class Supervised:
    """The nodes of one host."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._lives: dict[str, Lives] = {}
        self._order: Order | None = None
        self._stopped: set[str] = set()  # by an operator
        self._faults: dict[str, str] = {}
        self._changing = asyncio.Lock()
        self._resumed = asyncio.Event()
        self._ended = asyncio.Event()
        self._answering: set[asyncio.Task[Any]] = set()

    async def serve(self, order: Order | None) -> None:
        """Until told to stop, when no node runs any more, or to leave."""
        listening = self._name()
        loop = asyncio.get_running_loop()
        ending: set[asyncio.Task[Any]] = set()

        def end() -> None:
            ending.add(asyncio.create_task(self._end()))

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)  # the terminal that began it is gone
        server = await asyncio.start_unix_server(self._answer, sock=listening, limit=LINE_BYTES_MAX)
        logs = asyncio.create_task(self._look_around())
        try:
            await self._resume(order)
            self._resumed.set()
            await self._ended.wait()
        finally:
            logs.cancel()
            server.close()
            if rest := ending | self._answering:
                await asyncio.wait(rest, timeout=ASKED_TIMEOUT_S)
        log.info("ended")

    def _name(self) -> socket.socket:
        """Who has this address is the supervisor.

        Raises:
            ClusterFault: somebody else has it.
        """
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(address(self._run))
        except OSError as error:
            listening.close()
            raise ClusterFault(f"the nodes of {self._run.path} have a supervisor already") from error
        return listening

    async def _resume(self, order: Order | None) -> None:
        """What was ordered last goes on, unless there is a new order."""
        async with self._changing:
            try:
                kept = load(self._run)
            except ClusterFault as fault:
                self._fault("order", str(fault))
                kept = None
            if order is not None:
                await self._apply(order)
            elif kept is not None:
                self._order, self._stopped = kept.order, set(kept.stopped)
                self._adopt(kept.order)
                self._start([spec.name for spec in kept.order.nodes if spec.name not in self._stopped])

    # --- what is asked ------------------------------------------------------------------------------------

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            peer: socket.socket = writer.get_extra_info("socket")
            if may_ask(peer, self._run):
                async with asyncio.timeout(ASKED_TIMEOUT_S):
                    line = await reader.readuntil(b"\n")
                writer.write(encode(await self._asked(line)))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # who asked is gone
        finally:
            writer.close()
            self._answering.discard(task)

    async def _asked(self, line: bytes) -> Answer:
        try:
            return Told(await self._handle(decode_ask(line)))
        except msgspec.DecodeError as error:
            return Refused(f"the supervisor of {self._run.path} is of another version: {error}")
        except ClusterFault as fault:
            return Refused(str(fault))

    async def _handle(self, question: Ask) -> HostReport:
        await self._resumed.wait()
        match question:
            case Status():
                return self.report()
            case Apply(order):
                async with self._changing:
                    await self._apply(order)
            case Leave():
                self._ended.set()
            case Stop(names):
                if not names:
                    await self._end()
                    return self.report()
                async with self._changing:
                    self._adopt(self._ordered())
                    wanted = chosen(self._ordered(), names)
                    self._stopped.update(wanted)
                    self._keep()
                    await self._stop(wanted)
            case Restart(names):
                async with self._changing:
                    wanted = chosen(self._ordered(), names)
                    self._adopt(self._ordered())
                    self._stopped.difference_update(wanted)
                    self._keep()
                    await self._stop(wanted)
                    self._start(wanted)
        return self.report()

    def report(self) -> HostReport:
        """How every node is."""
        nodes = tuple(lives.report() for lives in self._lives.values())
        host = self._order.host if self._order is not None else ""
        return HostReport(host, "own", nodes, __version__, release(), tuple(self._faults.values()))

    async def _apply(self, order: Order) -> None:
        """Nothing is stopped before it is sure that the plan can be read by what is started."""
        order = msgspec.structs.replace(order, supervisor="own")
        self._order, before = order, self._order
        try:
            save(self._run, Kept(order, "own"))
        except ClusterFault:
            self._order = before
            raise
        self._faults.clear()
        self._stopped.clear()
        self._adopt(order)
        todo = changes(self.report(), order, digests_here(order))
        log.info("an order", stop=todo.stop, restart=todo.restart, start=todo.start)
        await self._stop([*todo.stop, *todo.restart])
        for name in todo.stop:
            del self._lives[name]
        self._start([spec.name for spec in order.nodes if spec.name in todo.restart + todo.start])

    async def _end(self) -> None:
        """All nodes are stopped, and the supervisor is done. What was ordered is kept: it may be started again."""
        async with self._changing:
            await self._stop(list(self._lives))
        self._ended.set()

    # --- nodes --------------------------------------------------------------------------------------------

    def _adopt(self, order: Order) -> None:
        """Follows the nodes that run here without us, wanted or not; names those that do not."""
        running = {record.name: record for record in self._run.records() if alive(record)}
        said = digests_here(order)
        for spec in order.nodes:
            lives = self._lives.setdefault(spec.name, Lives(spec, self._run, self._restore))
            lives.spec = spec
            if spec.name in running:
                lives.adopt(running[spec.name], self._launch(order, spec))
            else:
                lives.name_digest(said[spec.name])
        for name, record in running.items():
            if name not in self._lives and (role := role_of(name)) is not None:
                stranger = Lives(NodeSpec(name, role, host=order.host), self._run, self._restore)
                if stranger.adopt(record, Launch([], {}, "", order.restarts)):
                    self._lives[name] = stranger

    def _start(self, names: Sequence[str]) -> None:
        order = self._ordered()
        for spec in order.nodes:
            if spec.name in names:
                self._lives[spec.name].start(self._launch(order, spec))

    def _restore(self) -> None:
        """Puts back what nodes read, where somebody emptied the run directory."""
        with suppress(OSError, ClusterFault):
            if self._order is not None and not self._run.plan_file.exists():
                self._run.create()
                save_plan(self._run, self._order.plan)

    async def _stop(self, names: Sequence[str]) -> None:
        """Those that let work in first, so that nothing new comes to the others."""
        roles: dict[str, Role] = {name: self._lives[name].spec.role for name in names if name in self._lives}
        config = self._order.plan.config if self._order is not None else None
        grace_s = GRACE_S + (config.drain_timeout_s if config is not None else KILL_WAIT_S)
        for stage in stages(roles):
            ends: list[Coroutine[Any, Any, None]] = [self._lives[name].stop(grace_s) for name in stage]
            await asyncio.gather(*ends)

    def _launch(self, order: Order, spec: NodeSpec) -> Launch:
        try:
            said = variables((self._run.path / ENVIRONMENT_FILE).read_text())
        except (OSError, UnicodeDecodeError):
            said = {}
        ours = environment(order, spec, release(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        return Launch(node_command(self._run, spec.name), said | ours, digests_here(order)[spec.name], order.restarts)

    # --- its memory ---------------------------------------------------------------------------------------

    def _ordered(self) -> Order:
        if self._order is None:
            raise ClusterFault(f"nothing was ordered in {self._run.path}: say what with `tracehaul host apply`")
        return self._order

    def _keep(self) -> None:
        try:
            save(self._run, Kept(self._ordered(), "own", tuple(sorted(self._stopped))))
        except ClusterFault as fault:
            self._fault("order", str(fault))
        else:
            self._faults.pop("order", None)

    def _fault(self, about: str, why: str) -> None:
        self._faults[about] = why
        log.warning("not kept", about=about, why=why)

    async def _look_around(self) -> None:
        """Logs are kept small; who has nothing to do, as who began it died before it said what, ends."""
        began_by = os.getppid()
        while True:
            await asyncio.sleep(LOOK_S)
            if self._order is None and os.getppid() != began_by:
                self._ended.set()
            for name in (*self._lives, NAME):
                try:
                    await asyncio.to_thread(partial(keep_small, self._run.log(name)))
                except OSError as error:
                    self._fault(f"log of {name}", f"{self._run.log(name)}: {error.strerror}")


if __name__ == "__main__":  # without the rest of the command: it is there sooner, and smaller
    try:
        supervise(RunDir(Path(sys.argv[1])))
    except ClusterFault as fault:
        sys.exit(f"tracehaul: {fault}")
