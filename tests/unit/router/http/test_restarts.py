"""What a model wrote stands in the next prompt as it wrote it, though the router was started anew."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.answer_file import opened_answers
from router.dispatch.config import DispatchConfig
from tests.unit.router.http.test_verbatim import (
    CALL,
    DATED,
    NO_CALLS,
    TEMPLATE,
    TOOL,
    USER,
    Message,
    Talk,
    spelled,
    text,
)

MERGES = [("a", "r"), ("ar", "g"), ("o", "k"), ('"', ":"), ("d", "o"), ("n", "e")]
RESULT: Message = {"role": "tool", "content": "ok", "tool_call_id": "x"}


@asynccontextmanager
async def life(path: Path, says: list[str], trace: str | None = "t", template: str = TEMPLATE) -> AsyncGenerator[Talk]:
    """One life of a router."""
    async with opened_answers(path, DispatchConfig()) as answers:
        yield Talk(text(template, MERGES), says, answers, trace)


def after(told: Message) -> list[Message]:
    calls = told.get("tool_calls", ())
    return [RESULT | {"tool_call_id": call["id"]} for call in calls] or [USER]


@pytest.mark.parametrize("template", [TEMPLATE, NO_CALLS, DATED], ids=["shown", "left out", "dated"])
@pytest.mark.parametrize("client", [lambda m: m, spelled], ids=["as told", "spelled"])
@pytest.mark.parametrize("trace", ["t", None], ids=["named", "by messages"])
def test_each_step_in_a_life_of_its_own(
    tmp_path: Path, template: str, client: Callable[[Message], Message], trace: str | None
) -> None:
    async def main() -> None:
        messages: list[Message] = [{"role": "system", "content": "rule"}, USER]
        ran: list[int] = []
        names: set[str] = set()
        for says in (CALL, f"Well.\n{CALL}\n{CALL}", "done", "bye"):
            async with life(tmp_path / "answers", [says], trace, template) as talk:
                talk.ran = ran
                told = await talk.say(messages)
                assert talk.grows
                ran = talk.ran
                names.add(talk.dispatcher.requests[-1].trace)
                messages = [*messages, client(told), *after(told)]
        assert len(names) == 1

    asyncio.run(main())


def test_without_the_file_the_same_is_lost(tmp_path: Path) -> None:
    async def main() -> None:
        async with life(tmp_path / "answers", [CALL]) as talk:
            told = await talk.say([USER])
        async with life(tmp_path / "others", ["done"]) as again:
            again.ran = talk.ran
            await again.say([USER, told, RESULT])
            assert not again.grows

    asyncio.run(main())


def test_branches_come_back_one_after_the_other(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "answers"
        async with life(path, [CALL, "one", f"two {CALL}"]) as talk:
            first = spelled(await talk.say([USER]))
            ways: list[tuple[list[Message], list[int]]] = []
            for says in ("left", "right"):
                messages = [USER, first, RESULT | {"content": says}]
                ways.append(([*messages, spelled(await talk.say(messages)), USER], talk.ran))
        async with life(path, ["more"] * 4) as talk:
            for messages, ran in (*ways, *ways):
                talk.ran = ran
                await talk.say(messages)
                assert talk.grows

    asyncio.run(main())


def test_what_says_another_thing_is_not_put_in_place(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "answers"
        async with life(path, [CALL, "one", "two"]) as talk:
            told = await talk.say([USER])
            kept = talk.ran
            second = await talk.say([USER, told, RESULT])
            messages = [USER, told, RESULT, second, USER]
            await talk.say(messages)
        async with life(path, ["three"]) as talk:
            await talk.say([USER, told, RESULT, second | {"content": "edited"}, USER])
            assert talk.ran[: len(kept)] == kept
            assert "edited" in text(TEMPLATE, MERGES).raw(talk.ran)
        messages[0] = USER | {"content": "other"}
        async with life(path, ["four"]) as talk, life(tmp_path / "none", ["four"]) as knows_nothing:
            await talk.say(messages)
            await knows_nothing.say(messages)
            assert talk.ran == knows_nothing.ran

    asyncio.run(main())


async def delete(talk: Talk, **query: Any) -> int:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(talk.app), base_url="http://router") as http:
        return (await http.delete("/v1/traces/t", params=query)).status_code


@pytest.mark.parametrize("in_a_later_life", [False, True])
def test_what_a_client_deletes_is_in_no_file(tmp_path: Path, in_a_later_life: bool) -> None:
    async def main() -> None:
        path = tmp_path / "answers"
        async with life(path, ["a secret"]) as talk:
            told = await talk.say([USER])
            if not in_a_later_life:
                assert await delete(talk) == 200
        async with life(path, ["done"]) as talk:
            if in_a_later_life:
                assert b"secret" in path.read_bytes()
                assert await delete(talk, cache_salt="another") == 404
                assert await delete(talk) == 200
            assert b"secret" not in path.read_bytes()
            assert await delete(talk) == 404
            await talk.say([USER, told, USER])
            assert talk.dispatcher.requests

    asyncio.run(main())


def test_nothing_is_kept_of_a_trace_that_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "answers"
        async with life(path, ["a secret", "done"]) as talk:
            told = await talk.say([USER])
            talk.headers["x-trace-final"] = "1"
            await talk.say([USER, told, USER])
        assert b"secret" not in path.read_bytes()

    asyncio.run(main())


def test_tenants_do_not_find_each_others_answers(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "answers"
        async with life(path, [CALL]) as talk:
            told = await talk.say([USER], cache_salt="alice")
        async with life(path, ["done"]) as again:
            again.ran = talk.ran
            await again.say([USER, told, RESULT], cache_salt="bob")
            assert not again.grows

    asyncio.run(main())


def test_other_tools_are_told_anew(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "answers"
        async with life(path, [CALL]) as talk:
            told = await talk.say([USER])
        async with life(path, ["done"]) as talk:
            await talk.say([USER, told, USER], tools=[TOOL, {"type": "function", "function": {"name": "look"}}])
            assert '"look"' in text(TEMPLATE, MERGES).raw(talk.ran)

    asyncio.run(main())
