"""Steps that are asked for again: what they begin with, and what the traces are told so that they can be."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

import msgspec

from router.dispatch.run import Run
from router.dispatch.steps import Finished, Output, StepRequest
from router.policy.feasible import needs_of, refusal
from router.traces.asks import NOTHING, Ask
from router.traces.events import Event, StepBegan, StepGrew
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import CannotContinue
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import StepUsage

GROWN_S = (0.05, 0.5)
"""How often the traces hear of the tokens of steps that run: where few do, and where many do."""
GROWN_PER_S = 200
"""Of so many steps in a second, about."""
UNBOUNDED = 2**62


def possible(request: StepRequest, workers: Sequence[NodeInfo]) -> StepRequest:
    """The step as these workers can do it: where none could go on from what it begins with, it runs anew, with the same
    seed."""
    if not request.begun.packed or request.begun.ending is not None:
        return request
    refused = refusal(workers, needs_of(request.sampling, scores=request.prompt_logprobs is not None, began=True))
    return msgspec.structs.replace(request, begun=NOTHING) if isinstance(refused, CannotContinue) else request


def told(request: StepRequest) -> list[Output | Finished]:
    """What it tells before anything is computed for it; if that is all of it, its end."""
    begun, sampling = request.begun, request.sampling
    if not begun.packed:
        return []
    tokens = unpack_tokens(begun.packed)
    usage = begun.usage or StepUsage(prompt_tokens=request.prompt_tokens)
    usage = msgspec.structs.replace(usage, output_tokens=len(tokens))
    events: list[Output | Finished] = [Output(tokens, usage, begun.hits)]
    length = request.prompt_tokens + len(tokens)
    ending = begun.ending or sampling.finish_reason(tokens[-1], len(tokens), length, UNBOUNDED)
    if ending is not None:
        events.append(Finished(ending, usage) if begun.hits is None else Finished(ending, usage, begun.hits))
    return events


def began(request: StepRequest, now_s: float) -> StepBegan:
    """What the traces are told."""
    ask = None
    if request.ask:
        ask = Ask(request.ask, request.step, request.sampling.seed, now_s, keyed=request.keyed, begun=request.begun)
    return StepBegan(
        (request.salt, request.trace),
        request.step,
        request.parent,
        request.prompt_tokens,
        request.tools,
        request.agent,
        request.keep_s,
        ask,
        request.tenant,
        request.limits,
    )


def grown_s(steps: int) -> float:
    """How often the traces hear of so many steps that run."""
    shortest_s, longest_s = GROWN_S
    return min(longest_s, max(shortest_s, steps / GROWN_PER_S))


class Growing:
    """Tells the traces how far steps are that run long, where somebody writes that down.

    Args:
        runs: those that run now.
        send: tells the traces.
    """

    def __init__(self, runs: Iterable[Run], send: Callable[[Event], None]) -> None:
        self._runs = runs
        self._send = send
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """One has begun that may be asked for again."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(grown_s(len(self._asked())), self._tell)

    def close(self) -> None:
        """Tell nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        self._timer = None
        for run in self._asked():
            if (packed := run.grown()) is not None:
                self._send(StepGrew(run.key, run.request.step, packed))
            self.watch()

    def _asked(self) -> list[Run]:
        return [run for run in self._runs if run.request.ask]
