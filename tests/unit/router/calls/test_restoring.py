"""Answers that were kept become the very texts that were remembered."""

import asyncio
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from router.calls.call import Conversation, Message, ToolCall
from router.calls.rendering import Rendering
from router.calls.restoring import STRANGE_MAX, Restoring
from router.traces.kept import Kept, kept
from router.traces.texts import CutTokens, Said
from router.traces.texts import Text as Remembered
from router.traces.trace import TraceKey
from tests.unit.router.http.test_restarts import MERGES
from tests.unit.router.http.test_verbatim import CALL, NO_CALLS, TEMPLATE, THOUGHTS, USER, Talk, spelled, text
from tests.unit.router.http.test_verbatim import Message as Told
from tracehaul.wire.hashing import TOKEN_BYTES
from tracehaul.wire.ids import TraceId


class Noted:
    """Notes answers in memory; they are never read."""

    def __init__(self) -> None:
        self.kept: list[Kept] = []

    def keep(self, key: TraceKey, said: Said, heard: str | None) -> None:
        self.kept.append(kept(key, said, heard))

    def known(self, key: TraceKey, *, former: bool) -> bool:
        return False

    def heard(self, salt: str, name: str) -> TraceId | None:
        return None

    async def read(self, key: TraceKey) -> list[Kept]:
        raise NotImplementedError

    def placed(self, key: TraceKey, *, all_of_them: bool) -> None:
        raise NotImplementedError

    def drop_all(self, salt: str) -> None:
        raise NotImplementedError

    def drop(self, key: TraceKey) -> bool:
        return False

    async def dropped(self) -> None:
        raise NotImplementedError


class Memory:
    """A talk, and what is to be known of it again."""

    def __init__(self, template: str, says: list[str]) -> None:
        self.model = text(template, MERGES)
        self.noted = Noted()
        self.talk = Talk(self.model, says, self.noted)
        self.messages: list[Told] = [USER]

    async def say(self, client: int) -> None:
        told = await self.talk.say(self.messages)
        said = (told, spelled(told), told | {"reasoning_content": None}, spelled(told, refusal=None))[client]
        calls = told.get("tool_calls", ())
        results = [{"role": "tool", "content": "ok", "tool_call_id": call["id"]} for call in calls]
        self.messages = [*self.messages, said, *(results or [USER])]

    @property
    def texts(self) -> list[Remembered]:
        return self.talk.dispatcher.book.texts([("", TraceId("t"))])

    def restored(self, answers: list[Kept] | None = None, texts: tuple[Remembered, ...] = ()) -> Restoring:
        asked = Conversation(tuple(map(message_of, self.messages)), kit=("write",))
        cuts = CutTokens({"<|im_end|>": self.model.eos_tokens[0]}, "org/fake")
        answers = self.noted.kept if answers is None else answers
        tools = [json.loads(self.tools)]
        restoring = Restoring(self.model, cuts, Rendering(self.model, cuts), asked, tools, answers, texts)
        for _ in restoring:
            pass
        return restoring

    tools = '{"type": "function", "function": {"name": "write", "parameters": {"type": "object"}}}'


def message_of(told: Told) -> Message:
    calls = [
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in told.get("tool_calls") or ()
    ]
    return Message(
        told["role"],
        told.get("content") or "",
        reasoning=told.get("reasoning_content"),
        tool_calls=tuple(calls),
        tool_call_id=told.get("tool_call_id"),
    )


def plain(known: Remembered) -> tuple[Any, ...]:
    """What a text says, however it shares its memory."""
    tokens = known.packed[: known.shared * TOKEN_BYTES] + known.rest
    return known.text, tokens, known.prompt_end, known.generated, known.cuts, known.turns, known.dated_s, known.model


SAYS = st.sampled_from(
    [CALL, f"Well.\n{CALL}\n{CALL}", "done", " ok: arg\n", "<think>\nhm\n</think>\n\nyes", "", '{"a": 1}']
)


@given(
    template=st.sampled_from([TEMPLATE, NO_CALLS, THOUGHTS]),
    turns=st.lists(st.tuples(SAYS, st.integers(0, 3)), min_size=1, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_texts_are_those_of_before(template: str, turns: list[tuple[str, int]]) -> None:
    async def main() -> None:
        memory = Memory(template, [says for says, _ in turns])
        for _, client in turns:
            await memory.say(client)
        restoring = memory.restored()
        assert [plain(known) for known in restoring.texts] == [plain(known) for known in memory.texts]
        assert not restoring.all_told
        again = memory.restored(texts=tuple(memory.texts))
        assert (again.texts, again.all_told) == (memory.texts, True)

    asyncio.run(main())


def conversation(turns: int) -> Memory:
    memory = Memory(TEMPLATE, [CALL] * turns)

    async def main() -> None:
        for _ in range(turns):
            await memory.say(1)

    asyncio.run(main())
    return memory


def test_without_the_first_answer_those_that_follow_are_not_put_in_place() -> None:
    memory = conversation(4)
    assert memory.restored(memory.noted.kept[1:]).texts == []
    [known] = memory.restored(memory.noted.kept[:2]).texts
    assert memory.texts[0].text.startswith(known.text)


def test_of_a_conversation_that_is_another_only_some_are_tried() -> None:
    memory = conversation(STRANGE_MAX + 4)
    memory.messages[0] = {"role": "user", "content": "other"}
    encoded: list[str] = []
    encode = memory.model.encode
    memory.model.encode = lambda text, special=False: encoded.append(text) or encode(text, special)  # type: ignore[method-assign]
    assert memory.restored().texts == []
    assert len(encoded) == STRANGE_MAX


def test_tokens_that_the_model_does_not_have_are_not_put_in_place() -> None:
    memory = conversation(1)
    [answer] = memory.noted.kept
    foreign = Kept(*[getattr(answer, name) for name in Kept.__struct_fields__[:-1]], generated=b"\xff" * 4)
    assert memory.restored([foreign]).texts == []
