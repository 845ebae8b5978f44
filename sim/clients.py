"""The clients of a simulated cluster: agents that run their traces over HTTP and check every token they get."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from sim.answers import Answer, CallFailed, Told
from sim.checker import (
    AbortChecker,
    CachedChecker,
    Ended,
    OutputChecker,
    ProgressChecker,
    SampledChecker,
    TerminalChecker,
)
from sim.http import Exchange, Gateway
from sim.keeper import Keeper
from sim.loop import VirtualLoop
from sim.slot_checker import Truth
from sim.text import END, shown
from sim.traces import StepPlan, TracePlan
from sim.voices import Voice, voice_of
from tracehaul.engine.fake import TrueState
from tracehaul.runtime import clock
from tracehaul.wire.ids import TraceId
from tracehaul.wire.steps import Sampling

RETRY_S = 1.0
"""An agent whose call failed tries again after that long."""


class Books(NamedTuple):
    """The checkers that clients write into."""

    terminal: TerminalChecker
    output: OutputChecker
    cached: CachedChecker
    sampled: SampledChecker
    progress: ProgressChecker
    aborts: AbortChecker | None
    """None where faults may delay an abort."""
    truth: Truth


class _Call:
    """One attempt at a step: what may come of it, and what has."""

    def __init__(self, name: str, sampling: Sampling, router: str, prompts: Sequence[TrueState]) -> None:
        self.name = name
        self.sampling = sampling
        self.router = router
        self.outputs = [(prompt, prompt.generate(sampling)) for prompt in prompts]
        """What the prompt may be, and then its whole output."""
        self.known = len(prompts) == 1
        """Which of them it is."""
        self.received: list[int] = []
        self.text = ""
        self.marks = 0
        self.reason: str | None = None
        self.usage: Mapping[str, Any] | None = None
        self.answered = False
        """All of it is here."""

    @property
    def prompt(self) -> TrueState:
        """What the prompt is, as far as the client knows."""
        return self.outputs[0][0]

    @property
    def output(self) -> list[int]:
        """What the whole output then is."""
        return self.outputs[0][1]

    @property
    def sequences(self) -> list[list[int]]:
        """All that may be computed for it."""
        return [prompt.tokens + output for prompt, output in self.outputs]

    def take(self, told: Told, output: OutputChecker) -> None:
        """The next object of its answer."""
        if told.prompt is not None:
            found = [of for of in self.outputs if of[0].tokens == told.prompt]
            if not found:
                output.prompt(self.name, told.prompt, [prompt.tokens for prompt, _ in self.outputs])
            self.outputs = found or self.outputs
            self.known = True
        if told.tokens:
            self.received += told.tokens
            output.output(self.name, self.received, self.output if self.known else ())
        self.text += told.text
        self.marks += told.marks
        if told.reason is not None:
            output.told_once(self.name, "reason", self.reason)
            self.reason = told.reason
        self.usage = told.usage or self.usage


class Agents:
    """All clients of one run, of the model called ``model``."""

    def __init__(
        self, gateway: Gateway, books: Books, model: str, keeper: Keeper | None = None, *, sure: bool = True
    ) -> None:
        """``sure``: who served a trace's last step knows it for certain, as nobody can have taken it over."""
        self._gateway = gateway
        self._sure = sure
        self._keeper = keeper
        self._books = books
        self._model = model
        self._after: dict[tuple[TraceId, int], asyncio.Future[Voice]] = {}
        """The context after each step, for those who fork from it."""
        self.finished = 0
        self.failed = 0
        self.refused = 0
        """Calls whose trace was told to begin later."""
        self.hung_up = 0
        self.unheard: set[TraceId] = set()
        """Traces whose client left their last call before it heard anything: the router may never have begun it."""
        self.last_at: dict[TraceId, str] = {}
        """By which life of a router each trace's last call was served."""

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
            voice = voice_of(plan.dialect)
        else:
            voice = (await self._after[plan.fork_of, plan.fork_step]).copy()
        for index, step in enumerate(plan.steps):
            await asyncio.sleep(step.think_s)
            voice.say(step.new_tokens)
            before = voice.state
            await self._run_step(plan, index, step, voice)
            if voice.state.tokens[: len(before.tokens)] != before.tokens:
                self._books.truth.add(plan.salt, before)  # the router has lost track of it
            self._after[plan.trace, index].set_result(voice.copy())
            if self._keeper is not None:
                self._keeper.stepped(plan.trace, plan.salt, voice.state.tokens, final=_is_last(plan, index))
        self._books.truth.add(plan.salt, voice.state)

    async def _run_step(self, plan: TracePlan, index: int, step: StepPlan, voice: Voice) -> None:
        """As many attempts as it takes."""
        attempt = 0
        while True:
            attempt += 1
            name = f"{plan.trace}.{index}.{attempt}"
            began_s = clock.now_s()
            try:
                call, exchange = self._ask(plan, index, step, voice, name)
                await self._follow(plan, step, call, exchange)
            except CallFailed as failure:
                if failure.retry_after_s is not None:
                    self.refused += 1
                    await asyncio.sleep(failure.retry_after_s)
                    continue
                self.failed += 1
                _record(f"{name} failed {failure.code}")
                self._books.progress.failed(name, began_s, failure)
                await asyncio.sleep(RETRY_S)
                continue
            if call.answered:
                self._check_end(plan, call, step_name=f"{plan.trace}.{index}", retried=attempt > 1)
            _record(f"{name} {call.received}")
            if _is_last(plan, index) and not (call.received or call.answered):
                self.unheard.add(plan.trace)
            if _is_last(plan, index):
                self.last_at[plan.trace] = call.router
            kept = call.answered and not _is_last(plan, index)
            voice.heard(call.router, call.prompt, call.received, call.output, kept=kept)
            return

    def _ask(self, plan: TracePlan, index: int, step: StepPlan, voice: Voice, name: str) -> tuple[_Call, Exchange]:
        router = self._gateway.process
        call = _Call(name, step.sampling, router, voice.prompts(router if self._sure else ""))
        self._books.cached.began(plan.salt, f"{plan.trace}.{index}", call.sequences)
        if self._books.aborts is not None:
            self._books.aborts.asked(plan.trace)
        headers: dict[str, str] = {"X-Trace-Id": plan.trace}
        if plan.background:
            headers["X-Step-Class"] = "background"
        if plan.fork_of is not None:
            headers["X-Parent-Trace-Id"] = plan.fork_of
        if _is_last(plan, index):
            headers["X-Trace-Final"] = "true"
        body = {"model": self._model, **voice.body(), **_options(step, chat=plan.dialect == "chat")}
        if plan.salt:
            body["cache_salt"] = plan.salt
        if _keyed(plan, step):
            headers["Idempotency-Key"] = f"{plan.trace}.{index}"
        return call, self._gateway.post(voice.path, headers, msgspec.json.encode(body))

    async def _follow(self, plan: TracePlan, step: StepPlan, call: _Call, exchange: Exchange) -> None:
        """Take what comes, until its end or the client's leaving."""
        terminal, key = self._books.terminal, f"client {call.name}"
        answer: Answer | None = None
        terminal.began(key)
        cut_off, leaves = True, False
        try:
            while not call.answered and (not leaves or exchange.waits):
                if not leaves and step.hang_up_after is not None and len(call.received) >= step.hang_up_after:
                    await asyncio.sleep(step.hang_up_delay_s)
                    leaves = True  # what has arrived by now counts as seen
                    continue
                if answer is None:
                    answer = await exchange.start()
                    continue
                data, last = await exchange.more()
                for told in answer.feed(data, last=last):
                    terminal.message(key, terminal=False)
                    call.take(told, self._books.output)
                    if _keyed(plan, step) and step.sampling.logprobs is None:
                        self._books.sampled.received(f"{told.call}-0", call.router, len(call.received))
                if last:
                    cut_off = False
                    call.answered = answer.ended
                    if answer.ended:
                        terminal.message(key, terminal=True)
                    break
        finally:
            terminal.ended(key, cut_off=cut_off)
            exchange.leave()
        if leaves:
            self.hung_up += 1
            if self._books.aborts is not None:
                self._books.aborts.aborted(plan.trace)
        else:
            self.finished += 1

    def _check_end(self, plan: TracePlan, call: _Call, *, step_name: str, retried: bool) -> None:
        output, usage = self._books.output, call.usage or {}
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        done = Ended(call.reason or "", usage["prompt_tokens"], usage["completion_tokens"], cached)
        prompt = call.prompt.tokens
        output.finished(call.name, done, len(prompt), call.received, call.output, call.sampling)
        output.text(call.name, call.text, shown(call.received))
        if call.marks != (0 if call.sampling.logprobs is None else len(call.received)):
            output.marks(call.name, call.marks, len(call.received))
        moved = retried or not self._books.progress.calm
        self._books.cached.finished(plan.salt, step_name, prompt, cached, moved=moved)


def _is_last(plan: TracePlan, index: int) -> bool:
    return index == len(plan.steps) - 1


def _keyed(plan: TracePlan, step: StepPlan) -> bool:
    """Its client names the call, and asks by that name again: half of those that stay to the end."""
    return step.hang_up_after is None and sum(plan.trace.encode()) % 2 == 0


def _options(step: StepPlan, *, chat: bool) -> dict[str, Any]:
    """A body's part that says how to sample and to answer."""
    how = step.sampling
    body: dict[str, Any] = {
        "stream": step.stream,
        "return_token_ids": True,
        "max_tokens": how.max_tokens,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "top_k": how.top_k,
        "presence_penalty": how.presence_penalty,
        "frequency_penalty": how.frequency_penalty,
        "repetition_penalty": how.repetition_penalty,
        "seed": how.seed,
        "min_tokens": how.min_tokens,
        "ignore_eos": END not in how.stop_tokens,
    }
    if step.stream:
        body["stream_options"] = {"include_usage": True}
    if how.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": how.logprobs} if chat else {"logprobs": how.logprobs}
    return body


def _record(line: str) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.record(line)
