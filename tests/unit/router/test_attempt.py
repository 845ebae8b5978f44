"""What a router makes of the replies that it finds waiting; the worker is scripted."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
import pytest

from router.dispatch.attempt import Attempt
from router.dispatch.bills import Bills
from router.dispatch.run import Run
from router.dispatch.steps import Finished, Output, StepRequest, Tell
from router.fleet.load import Key
from router.policy.placement import Placement
from router.policy.prices import Prices, Tariff
from router.policy.retention import RetentionConfig
from router.traces.contexts import listed
from router.traces.machine import Traces
from sim import loop as virtual
from tracehaul.runtime import clock
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import DeadlineExceeded, ProtocolError, TraceDeleted
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId
from tracehaul.wire.messages import Reply
from tracehaul.wire.naming import SGLANG, Naming
from tracehaul.wire.steps import Sampling, StepDone, StepUsage, TokenLogprobs, Tokens

USAGE = StepUsage(prompt_tokens=2)
DONE = StepDone("length", USAGE, 7)


class Replies:
    """Each of the lists at once; then silence."""

    def __init__(self, script: Sequence[list[Reply]]) -> None:
        self.script = list(script)
        self.closed = False
        self.diverted: Callable[[Reply], bool] | None = None

    def divert(self, take: Callable[[Reply], bool]) -> None:
        self.diverted = take

    async def take(self) -> list[Reply]:
        if not self.script:
            await asyncio.sleep(1000)
        return self.script.pop(0)

    async def aclose(self) -> None:
        self.closed = True


class Books:
    """Fleets' and relief's entries: how often each was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def token(self, now_s: float) -> None:
        self.told.append("token")

    def ended(self) -> None:
        self.told.append("ended")

    def leave(self, run: Run, placement: Placement) -> None:
        self.told.append("left")


def attempt(run: Run, *script: list[Reply]) -> tuple[Attempt, Replies, Books]:
    placement = Placement(Key(NodeId("decode-0"), Generation(1)), None, None, 0, None, "", 0.0, None, 0.0, 0.0)
    replies, books = Replies(script), Books()
    bills = Bills(Traces(1, 1 << 20, RetentionConfig()), lambda event: None, Prices(Tariff()))
    return Attempt(run, placement, cast(Any, replies), cast(Any, books), cast(Any, books), bills), replies, books


def step(deadline_s: float | None = None, tell: Tell | None = None) -> Run:
    request = StepRequest(
        StepId("s"), TraceId("t"), None, pack_tokens([1, 2]), Sampling(max_tokens=9), deadline_s=deadline_s
    )
    return Run(request, (), (), tell)


def tokens(*ids: int, **more: Any) -> Tokens:
    return Tokens(pack_tokens(ids), **more)


def test_a_step_on_a_server_that_names_blocks_itself_finds_and_leaves_those() -> None:
    async def main() -> None:
        naming = Naming(BlockHash(b"r" * 16), 4, SGLANG, "tenant")
        worker = NodeInfo(
            *(NodeId("decode-0"), Generation(1), "decode", "d:1"), root=naming.root, block_tokens=4, hashing=SGLANG
        )
        prompt = pack_tokens(range(10))
        request = StepRequest(StepId("s"), TraceId("t"), None, prompt, Sampling(max_tokens=9), salt="tenant")
        run = Run(request, (), (), None)
        run.cut(worker)
        assert list(run.hashes) == naming.names(prompt)
        assert len(run.hashes) == 2
        run.emitted += [20, 21, 22]
        run.ending = "length"
        left = run.over(0.0).left
        assert left is not None
        assert listed(left.hashes) == naming.names(pack_tokens([*range(10), 20, 21]))
        following = Run(msgspec.structs.replace(request, prompt=left.packed + pack_tokens([30] * 4)), (), (left,), None)
        following.cut(worker)
        assert following.continues == "s"
        assert list(following.hashes) == naming.names(following.request.prompt)

    virtual.run(main)


def test_tokens_that_wait_are_one_output_and_those_with_more_to_tell_stay_apart() -> None:
    scores = (TokenLogprobs(-1.0),)

    async def main() -> None:
        run = step()
        first: list[Reply] = [
            tokens(3, usage=USAGE),
            tokens(4),
            tokens(5),
            tokens(6, logprobs=scores),
            tokens(7),
            tokens(8),
            DONE,
        ]
        tried, replies, books = attempt(run, first)
        events = await tried.next()
        outputs = [event for event in events if isinstance(event, Output)]
        assert [output.tokens for output in outputs] == [[3], [4, 5], [6], [7, 8]]
        assert [output.logprobs for output in outputs] == [None, None, scores, None]
        assert [output.usage is not None for output in outputs] == [True, False, False, False]
        assert isinstance(events[-1], Finished)
        assert run.emitted == [3, 4, 5, 6, 7, 8]
        await tried.close()
        assert run.warm is not None
        assert run.warm.retained_tokens == 7
        assert replies.closed
        assert books.told == ["token", "left", "ended", "left"]

    virtual.run(main)


def test_one_at_a_time_they_are_told_at_once_and_counted_when_it_ends() -> None:
    async def main() -> None:
        run = step()
        tried, _, books = attempt(run, [tokens(3, usage=USAGE)], [tokens(4)], [tokens(5)])
        assert [[event.tokens for event in await tried.next() if isinstance(event, Output)] for _ in range(3)] == [
            [[3]],
            [[4]],
            [[5]],
        ]
        await tried.close()
        assert run.warm is not None
        assert run.warm.retained_tokens == 2 + 3 - 1  # the last token was not computed
        assert books.told.count("token") == 1

    virtual.run(main)


def test_what_came_before_an_error_is_told_and_nothing_after_it() -> None:
    async def main() -> None:
        for wrong in ([Ok()], []):
            run = step()
            tried, _, _ = attempt(run, [tokens(3), tokens(4), *wrong, *([tokens(5)] if wrong else [])], [])
            events = await tried.next()
            assert [event.tokens for event in events if isinstance(event, Output)] == [[3, 4]]
            for _ in range(2):
                with pytest.raises(ProtocolError):
                    await tried.next()
            assert run.emitted == [3, 4]

    virtual.run(main)


def test_plain_tokens_are_told_at_once_where_they_are_taken_and_no_others() -> None:
    told: list[list[int]] = []
    takes = True

    def tell(tokens: list[int]) -> bool:
        told.append(tokens)
        return takes

    async def main() -> None:
        nonlocal takes
        run = step(tell=tell)
        tried, replies, _ = attempt(run, [tokens(3, usage=USAGE)])
        assert replies.diverted is not None
        assert not replies.diverted(tokens(2))  # what the first one tells is not known yet
        await tried.next()
        assert replies.diverted(tokens(4, 5))
        assert (told, run.emitted) == ([[4, 5]], [3, 4, 5])
        others = (tokens(6, usage=USAGE), tokens(6, logprobs=(TokenLogprobs(-1.0),)), tokens(), DONE, Ok())
        assert not any(replies.diverted(reply) for reply in others)
        assert told == [[4, 5]]
        takes = False
        assert not replies.diverted(tokens(6))
        assert run.emitted == [3, 4, 5]
        assert attempt(step())[1].diverted is None

    virtual.run(main)


def test_nothing_counts_after_the_end() -> None:
    async def main() -> None:
        run = step()
        tried, _, _ = attempt(run, [tokens(3), DONE, tokens(4)])
        events = await tried.next()
        assert isinstance(events[-1], Finished)
        assert run.emitted == [3]

    virtual.run(main)


def test_others_end_a_wait_at_once() -> None:
    async def main() -> None:
        run = step()
        tried, _, _ = attempt(run, [tokens(3)])
        await tried.next()
        asyncio.get_running_loop().call_later(1.0, run.stop)
        with pytest.raises(TraceDeleted):
            await tried.next()
        assert clock.now_s() == pytest.approx(1.0, abs=0.01)
        with pytest.raises(TraceDeleted):  # and it stays so
            await tried.next()

    virtual.run(main)


def test_a_wait_ends_at_the_deadline_with_one_timer_for_all() -> None:
    async def main() -> None:
        run = step(deadline_s=clock.now_s() + 2.0)
        tried, _, _ = attempt(run, [tokens(3)], [tokens(4)])
        await tried.next()
        await tried.next()
        began_s = clock.now_s()
        with pytest.raises(DeadlineExceeded):
            await tried.next()
        assert clock.now_s() - began_s == pytest.approx(2.0)
        with pytest.raises(DeadlineExceeded):
            await tried.next()
        run.close()

    virtual.run(main)
