"""Calls without a dialect: what happens in them, and who is told."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from router.calls.call import Call, Conversation, Ids, Message, Options, Plain
from router.calls.calls import Calls
from router.calls.errors import CallFailed
from router.calls.events import Begun, CallEvent, Choice, Ended, Piece, Said
from router.calls.fakes import IM_END, FakeDispatcher, FakeText, say
from router.calls.limits import CallLimits
from router.calls.running import EVENTS_MAX, Several
from router.dispatch.steps import Finished, Output
from router.traces.events import Answered
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import StepUsage


def call(*prompts: Any, **options: Any) -> Call:
    return Call(id="c", model="org/fake", prompts=prompts, where="prompts", options=Options(**options), tenant="red")


def run(dispatcher: FakeDispatcher, *asked: Call, **headers: str) -> tuple[list[CallEvent], list[Choice]]:
    """Run them one after the other; events and choices of the last."""

    async def main() -> tuple[list[CallEvent], list[Choice]]:
        calls = Calls(dispatcher, {"org/fake": FakeText()}, CallLimits(), InlineOffload())
        for one in asked:
            events: list[CallEvent] = []
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            with calls.identified(one, names, "fresh") as identity:
                async with await calls.accept(one, identity) as running:
                    while not running.done:
                        events += await running.next()
                    choices = running.choices()
        return events, choices

    return asyncio.run(main())


def test_a_choice_begins_goes_on_and_ends() -> None:
    events, choices = run(FakeDispatcher(say("ab")), call(Plain("hi")))
    assert [type(event) for event in events] == [Begun, Piece, Piece, Piece, Piece, Ended]
    pieces = [event for event in events if isinstance(event, Piece)]
    assert [piece.said.content for piece in pieces] == ["a", "b", "", ""]
    assert [token for piece in pieces for token in piece.tokens] == [97, 98, IM_END]
    assert events[-1] == Ended(0, "stop", False)
    (choice,) = choices
    assert (choice.said, choice.tokens, choice.reason) == (Said(content="ab"), [97, 98, IM_END], "stop")


def test_prompts_of_every_kind_and_their_choices_are_in_order() -> None:
    dispatcher = FakeDispatcher(lambda r: [Output([unpack_tokens(r.prompt)[0]]), Finished("length", StepUsage())])
    asked = call(Plain("a"), Ids([98, 99]), n=2, return_token_ids=True)
    events, choices = run(dispatcher, asked, x_trace_id="t")
    assert [choice.said.content for choice in choices] == ["a", "a", "b", "b"]
    assert [choice.opening.prompt_ids for choice in choices] == [[97], [97], [98, 99], [98, 99]]
    assert {event.choice for event in events if isinstance(event, Begun)} == {0, 1, 2, 3}
    assert [request.trace for request in dispatcher.requests] == ["t", "t", "t.1", "t.1"]
    assert {request.salt for request in dispatcher.requests} == {"red"}


def test_usage_comes_with_each_event_where_it_is_wanted() -> None:
    events, _ = run(FakeDispatcher(say("ab")), call(Plain("hi"), continuous_usage=True))
    assert [event.usage.output_tokens for event in events if event.usage is not None] == [1, 1, 2, 3, 3, 3]
    events, _ = run(FakeDispatcher(say("ab")), call(Plain("hi")))
    assert all(event.usage is None for event in events)


def test_only_a_conversation_is_read_for_calls_of_tools() -> None:
    said = Conversation((Message("user", "hi"),))
    for prompt, told in ((said, True), (Plain("hi"), False)):
        dispatcher = FakeDispatcher(say("x"))
        asked = call(prompt)
        run(dispatcher, asked)
        answered = [event for event in dispatcher.keeper.events if isinstance(event, Answered)]
        assert [event.tools is not None for event in answered] == [told]


def test_each_prompt_of_a_call_keeps_the_ids_of_its_own_trace() -> None:
    dispatcher = FakeDispatcher(say("the abc", reason="length"))  # byte by byte, where the tokenizer would merge
    first = call(Plain("one: "), Plain("two: "))
    run(dispatcher, first, call(Plain("one: the abc"), Plain("two: the abc")), x_trace_id="t")
    for before, after in zip(dispatcher.requests[:2], dispatcher.requests[2:], strict=True):
        assert unpack_tokens(after.prompt) == [*unpack_tokens(before.prompt), *b"the abc"]


def test_what_is_refused_names_what_holds_the_prompts() -> None:
    for prompt in (Plain(""), Ids([10**6]), Plain("x" * 5000), Plain("x" * 500_000)):
        with pytest.raises(CallFailed) as caught:
            run(FakeDispatcher(say("x")), call(prompt))
        assert (caught.value.cause, caught.value.param) == ("invalid", "prompts")


def test_steps_wait_for_a_client_that_reads_slowly() -> None:
    told = 0

    class Endless(FakeDispatcher):
        async def run(self, request: Any, tell: Any = None) -> Any:
            nonlocal told
            while True:
                await asyncio.sleep(0)
                told += 1
                yield Output([97])

    async def main() -> None:
        dispatcher = Endless(say("x"))
        calls = Calls(dispatcher, {"org/fake": FakeText()}, CallLimits(), InlineOffload())
        one = call(Plain("hi"), n=2)
        with calls.identified(one, {}, "fresh") as identity:
            accepted = (await calls.accept(one, identity))._accepted
        async with Several(dispatcher, accepted.steps, 2) as steps:
            taken: Sequence[Any] = ()
            for _ in range(3):
                before = told
                for _ in range(2 * EVENTS_MAX):
                    await asyncio.sleep(0)
                assert told - before <= EVENTS_MAX + 2
                taken = await steps.next()
                assert len(taken) == EVENTS_MAX
            assert {index for index, _ in taken} == {0, 1}

    asyncio.run(main())
