"""One node and its lives: started, followed, started again as the policy says, ended when told."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cluster.hosts.orders import DIGEST_VARIABLE, NodeCondition, NodeReport
from cluster.hosts.restarts import Again, History, Leave, RestartPolicy, judge
from cluster.plan import NodeSpec
from cluster.rundir import ClusterFault, NodeState, ProcessRecord, RunDir, alive
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log

log = Log(__name__)

KILL_WAIT_S = 10.0
"""For the kernel to end a process that was killed."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Launch(NamedTuple):
    """What a life begins with."""

    command: list[str]
    environment: dict[str, str]
    digest: str
    policy: RestartPolicy


class Lives:
    """Of one node. Its methods are called on one loop, one at a time but for :meth:`report`."""

    def __init__(self, spec: NodeSpec, run: RunDir, prepare: Callable[[], None]) -> None:
        """``prepare``: called before each life."""
        self.spec = spec
        self._run = run
        self._prepare = prepare
        self._launch: Launch | None = None
        self._pid: int | None = None
        self._pidfd = -1
        self._child: subprocess.Popen[bytes] | None = None  # None where it was started by another supervisor
        self._digest = ""
        self._born_s = 0.0
        self._state: NodeCondition = "stopped"
        self._since_s = clock.boot_s()
        self._exit_code: int | None = None
        self._restarts = 0
        self._fault = ""
        self._told = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    def adopt(self, record: ProcessRecord, launch: Launch) -> bool:
        """Follows a process that another supervisor started; false if it has ended meanwhile.

        Its exit code is nobody's to see: when it ends by itself it counts as a death.
        """
        if self._following is not None and not self._following.done():
            return self._pid is not None
        try:
            handle = os.pidfd_open(record.pid)
        except OSError:
            return False
        # Compared after opening: from here on the handle cannot come to mean another process.
        if not alive(record):
            os.close(handle)
            return False
        self._launch, self._child = launch, None
        self._pid, self._pidfd = record.pid, handle
        self._born_s = record.start_ticks / _TICKS_PER_S
        self._digest = digest_of(record.pid)
        self._become("running")
        log.info("a node is followed", name=self.spec.name, pid=record.pid)
        self._follow()
        return True

    def start(self, launch: Launch) -> None:
        """Begins a life, unless it lives or waits for the next."""
        self._launch = launch
        if self._following is None or self._following.done():
            self._begin(launch)
            self._follow()

    def name_digest(self, digest: str) -> None:
        """What it would be started with, where it has not been."""
        self._digest = self._digest or digest

    async def stop(self, grace_s: float) -> None:
        """Ends it: told first, killed with its children after ``grace_s``."""
        self._told.set()
        task = self._following
        if task is not None and not task.done():
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
            done, _ = await asyncio.wait([task], timeout=grace_s)
            if not done:
                log.warning("a node had to be killed", name=self.spec.name, grace_s=grace_s)
                self._kill()
                await asyncio.wait([task], timeout=KILL_WAIT_S)
        if self._pid is None:
            self._become("stopped")

    def report(self) -> NodeReport:
        """How it is now."""
        lives = self._pid is not None
        phase = self._run.state(self.spec.name).phase if lives else ""
        state = self._state
        if lives:
            state = "running" if phase in ("ready", "stopping") else "starting"
        line = "" if lives else self._fault or "".join(self._run.log_tail(self.spec.name, 1))
        since_s = clock.boot_s() - (self._born_s if lives else self._since_s)
        return NodeReport(
            name=self.spec.name,
            role=self.spec.role,
            state=state,
            pid=self._pid,
            restarts=self._restarts,
            since_s=round(since_s, 1),
            exit_code=self._exit_code,
            phase=phase,
            last_line=line,
            digest=self._digest,
        )

    # --- a life -------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        self._told.clear()
        self._following = asyncio.create_task(self._live(), name=f"follow {self.spec.name}")

    async def _live(self) -> None:
        """From one life to the next, until it is to be left alone."""
        history = History()
        while True:
            code = await self._ended() if self._pid is not None else None
            now_s = clock.boot_s()
            launch = self._launch
            assert launch is not None
            history, verdict = judge(
                history,
                launch.policy,
                exit_code=code,
                lived_s=now_s - self._born_s,
                now_s=now_s,
                told=self._told.is_set(),
            )
            self._exit_code = code
            self._become(verdict.state)
            log.info("a node ended", name=self.spec.name, exit_code=code, now=verdict.state)
            match verdict:
                case Leave():
                    return
                case Again(delay_s):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(delay_s):
                            await self._told.wait()
            if self._told.is_set():
                self._become("stopped")
                return
            self._restarts += 1
            self._begin(self._launch or launch)

    def _begin(self, launch: Launch) -> None:
        """A new process; where there can be none that is a death like others."""
        name = self.spec.name
        self._digest, self._born_s, self._fault = launch.digest, clock.boot_s(), ""
        self._prepare()
        with suppress(OSError, ClusterFault):  # a note for those who look
            self._run.write_state(name, NodeState("starting"))
        try:
            self._child = self._spawn(launch)
            self._pid, self._pidfd = self._child.pid, os.pidfd_open(self._child.pid)
        except OSError as error:
            log.error("a node cannot be started", name=name, why=error)
            self._fault = f"cannot be started: {error}"
            return
        self._become("starting")
        log.info("a node was started", name=name, pid=self._pid)

    def _spawn(self, launch: Launch) -> subprocess.Popen[bytes]:
        """It leads a session, so that it outlives whoever started it, and can be killed with its children."""
        try:
            output = self._run.log(self.spec.name).open("ab")
        except OSError as error:  # a node without a log serves as well
            log.warning("a node's output is not kept", name=self.spec.name, why=error)
            output = Path(os.devnull).open("ab")  # noqa: SIM115 - closed below
        with output:
            return subprocess.Popen(
                launch.command,
                cwd=self._run.path if self._run.path.is_dir() else "/",
                env=os.environ | launch.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def _ended(self) -> int | None:
        """Waits for the process that lives; its exit code if it is our child."""
        gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(self._pidfd)
        code = self._child.wait() if self._child is not None else None
        os.close(self._pidfd)
        self._pid, self._pidfd, self._child = None, -1, None
        return code

    def _kill(self) -> None:
        if self._pid is None:
            return
        with suppress(ProcessLookupError):
            if os.getpgid(self._pid) == self._pid:
                os.killpg(self._pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _become(self, state: NodeCondition) -> None:
        self._state = state
        self._since_s = clock.boot_s()


def digest_of(pid: int) -> str:
    """Of what that process was started with; empty if it does not say."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    prefix = f"{DIGEST_VARIABLE}=".encode()
    return next((said.removeprefix(prefix).decode() for said in variables if said.startswith(prefix)), "")
