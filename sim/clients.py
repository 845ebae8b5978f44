"""The clients of a simulated cluster: agents that run their traces and check every token they get."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from router.dispatch.steps import Finished, Output, StepRequest
from sim.checker import AbortChecker, CachedChecker, OutputChecker, ProgressChecker, TerminalChecker, Truth, is_terminal
from sim.keeper import Keeper
from sim.loop import VirtualLoop
from sim.nodes import Life
from sim.traces import StepPlan, TracePlan
from tracehaul.engine.fake import TrueState
from tracehaul.runtime import clock
from tracehaul.wire.errors import ClusterError, PeerLost
from tracehaul.wire.hashing import pack_tokens, unpack_tokens
from tracehaul.wire.ids import StepId, TraceId

RETRY_S = 1.0
"""An agent whose call failed tries again after that long."""

_Event = Output | Finished | ClusterError | None
"""None: the answer ended."""


class Gateway:
    """Stands for HTTP: a request runs inside the router's process, its answer crosses to the client's."""

    def __init__(self) -> None:
        self.router: Life | None = None
        self._open: dict[asyncio.Task[None], asyncio.Queue[_Event]] = {}
        self._heard: set[StepId] = set()
        self._left: set[StepId] = set()

    def ask(self, request: StepRequest) -> tuple[asyncio.Task[None], "asyncio.Queue[_Event]"]:
        """Make a request, until :meth:`leave`.

        Raises:
            PeerLost: nobody listens.
        """
        life = self.router
        if life is None or not life.alive or not life.ready.is_set():
            raise PeerLost("connection refused")
        answer: asyncio.Queue[_Event] = asyncio.Queue()
        task = asyncio.get_running_loop().create_task(self._serve(life, request, answer), context=life.context())
        self._open[task] = answer
        task.add_done_callback(lambda _: self._open.pop(task, None))
        return task, answer

    def leave(self, request: StepRequest, task: "asyncio.Task[None]") -> None:
        """Hang up, or end. A router that is frozen hears first of the request, and then of that."""
        if request.step in self._heard:
            task.cancel()
        else:
            self._left.add(request.step)

    def lost(self) -> None:
        """The router's process is gone, and all connections to it."""
        for answer in self._open.values():
            answer.put_nowait(PeerLost("connection reset"))
        self._open.clear()

    async def _serve(self, life: Life, request: StepRequest, answer: "asyncio.Queue[_Event]") -> None:
        assert life.dispatch is not None
        self._heard.add(request.step)
        if request.step in self._left:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()  # takes effect where the router first waits
        try:
            async with aclosing(life.dispatch.run(request)) as events:
                async for event in events:
                    answer.put_nowait(event)
            answer.put_nowait(None)
        except ClusterError as error:
            answer.put_nowait(error)
        finally:
            life.dispatch.book.answered(request.salt, request.trace, request.step, response=None)


class Books:
    """The checkers that clients write into."""

    def __init__(
        self,
        terminal: TerminalChecker,
        output: OutputChecker,
        cached: CachedChecker,
        progress: ProgressChecker,
        aborts: AbortChecker | None,
        truth: Truth,
    ) -> None:
        self.terminal = terminal
        self.output = output
        self.cached = cached
        self.progress = progress
        self.aborts = aborts
        """None where faults may delay an abort."""
        self.truth = truth


class Agents:
    """All clients of one run."""

    def __init__(self, gateway: Gateway, books: Books, vocab_size: int, keeper: Keeper | None = None) -> None:
        self._gateway = gateway
        self._keeper = keeper
        self._books = books
        self._vocab_size = vocab_size
        self._after: dict[tuple[TraceId, int], asyncio.Future[TrueState]] = {}
        """The context after each step, for those who fork from it."""
        self.finished = 0
        self.failed = 0
        self.hung_up = 0

    async def run(self, plans: Sequence[TracePlan]) -> None:
        """Until every trace has ended."""
        loop = asyncio.get_running_loop()
        for plan in plans:
            for index in range(len(plan.steps)):
                self._after[plan.trace, index] = loop.create_future()
        await asyncio.gather(*(self._run_trace(plan) for plan in plans))

    async def _run_trace(self, plan: TracePlan) -> None:
        await asyncio.sleep(plan.start_s)
        if plan.fork_of is None:
            state = TrueState(self._vocab_size)
        else:
            state = (await self._after[plan.fork_of, plan.fork_step]).copy()
        for index, step in enumerate(plan.steps):
            await asyncio.sleep(step.think_s)
            state.extend(step.new_tokens)
            state.extend(await self._run_step(plan, index, step, state))
            self._after[plan.trace, index].set_result(state.copy())
            if self._keeper is not None:
                self._keeper.stepped(plan.trace, plan.salt, state.tokens, final=index == len(plan.steps) - 1)
        self._books.truth.add(plan.salt, state)

    async def _run_step(self, plan: TracePlan, index: int, step: StepPlan, state: TrueState) -> list[int]:
        """The output that the client got, after as many attempts as it takes."""
        expected = state.generate(step.sampling)
        attempt = 0
        while True:
            attempt += 1
            request = StepRequest(
                step=StepId(f"{plan.trace}.{index}.{attempt}"),
                trace=plan.trace,
                parent=plan.fork_of,
                prompt=pack_tokens(state.tokens),
                sampling=step.sampling,
                salt=plan.salt,
                final=index == len(plan.steps) - 1,
            )
            self._books.cached.began(plan.salt, f"{plan.trace}.{index}", state.tokens + expected)
            began_s = clock.now_s()
            try:
                received = await self._attempt(request, step, expected, retried=attempt > 1)
            except ClusterError as error:
                self.failed += 1
                _record(f"{request.step} failed {error.code}")
                self._books.progress.failed(request.step, began_s, error)
                await asyncio.sleep(RETRY_S)
                continue
            _record(f"{request.step} {received}")
            return received

    async def _attempt(self, request: StepRequest, step: StepPlan, expected: list[int], *, retried: bool) -> list[int]:
        terminal, key = self._books.terminal, f"client {request.step}"
        received: list[int] = []
        task, answer = self._gateway.ask(request)
        terminal.began(key)
        cut_off = True
        try:
            while True:
                if step.hang_up_after is not None and len(received) >= step.hang_up_after:
                    await asyncio.sleep(step.hang_up_delay_s)
                    if task.done() and answer.empty():
                        cut_off = False  # too late, all of it is here
                    return await self._hang_up(request, answer, received, expected)
                event = await answer.get()
                if event is None:
                    cut_off = False
                    raise AssertionError("an answer without a terminal event")
                if isinstance(event, ClusterError):
                    raise event
                terminal.message(key, terminal=is_terminal(event))
                if isinstance(event, Output):
                    received += event.tokens
                    self._books.output.output(request.step, received, expected)
                    continue
                self.finished += 1
                self._check_finish(request, event, received, expected, retried)
                if await answer.get() is not None:
                    terminal.message(key, terminal=False)
                cut_off = False
                return received
        finally:
            terminal.ended(key, cut_off=cut_off)
            self._gateway.leave(request, task)

    async def _hang_up(
        self, request: StepRequest, answer: "asyncio.Queue[_Event]", received: list[int], expected: list[int]
    ) -> list[int]:
        """Leave; what arrived by now counts as seen."""
        self.hung_up += 1
        while not answer.empty():
            event = answer.get_nowait()
            if isinstance(event, Output):
                received += event.tokens
                self._books.output.output(request.step, received, expected)
        if self._books.aborts is not None:
            self._books.aborts.aborted(request.step)
        return received

    def _check_finish(
        self, request: StepRequest, done: Finished, received: list[int], expected: list[int], retried: bool
    ) -> None:
        self._books.output.finished(request.step, done, request.prompt_tokens, received, expected, request.sampling)
        name = request.step.rpartition(".")[0]
        moved = retried or not self._books.progress.calm
        self._books.cached.finished(request.salt, name, unpack_tokens(request.prompt), done, moved=moved)


def _record(line: str) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.record(line)
