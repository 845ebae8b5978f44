"""A third dialect costs one folder: it is put into the table, and everything else serves it."""

import ast
import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Output, StepRequest
from router.http.app import DIALECTS, create_app
from router.http.config import ApiConfig
from tests.unit.router.dialects.toy.dialect import Toy
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.hashing import unpack_tokens

ROUTER = Path(__file__).parents[4] / "router"


def ask(dispatcher: FakeDispatcher, *calls: tuple[str, Any], config: ApiConfig | None = None) -> list[httpx.Response]:
    """Post each (path, body), one after the other."""

    async def main() -> list[httpx.Response]:
        table = {**DIALECTS, "/toy": Toy()}
        app = create_app(
            dispatcher, {"org/fake": FakeText()}, lambda: b"", config or ApiConfig(), InlineOffload(), dialects=table
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(20):
            return [
                await (client.post(path, content=body) if isinstance(body, str) else client.post(path, json=body))
                for path, body in calls
            ]

    return asyncio.run(main())


def test_a_whole_answer() -> None:
    dispatcher = FakeDispatcher(say("héllo"))
    (answer,) = ask(dispatcher, ("/toy", "org/fake\nwhole\nyou: hi"))
    assert (answer.status_code, answer.text) == (200, "héllo\nstop\nspent 7\n")
    (request,) = dispatcher.requests
    assert unpack_tokens(request.prompt) == FakeText().encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert answer.headers["x-trace-id"] == request.trace


def test_a_stream() -> None:
    (answer,) = ask(FakeDispatcher(say("abc")), ("/toy", "org/fake\nlive\nyou: hi"))
    assert answer.text == "begin\n+a\n+b\n+c\nstop\nspent 4\n"
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_a_forced_call_of_a_tool() -> None:
    said = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    dispatcher = FakeDispatcher(say(said))
    (answer,) = ask(dispatcher, ("/toy", "org/fake\nwhole\nyou: hi\ntool: clock"))
    assert answer.text.startswith("\ncall clock {}\nstop\n")
    assert dispatcher.requests[0].sampling.constraint is not None


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("org/fake\nnow\nyou: hi", 400, "no: neither live nor whole: now (invalid, line 2)\n"),
        ("other\nwhole\nyou: hi", 404, "no: the model 'other' does not exist (not_found, model)\n"),
        ("org/fake\nlive\nyou: " + "x" * 5000, 400, "(invalid, lines)\n"),
        ("org/fake\nwhole\nyou: refuse", 400, "no: the template refuses this (invalid, None)\n"),
    ],
)
def test_errors_are_told_in_its_own_form(body: str, status: int, says: str) -> None:
    dispatcher = FakeDispatcher(say("x"))
    (answer,) = ask(dispatcher, ("/toy", body))
    assert answer.status_code == status
    assert answer.text.endswith(says)
    assert not dispatcher.requests


def test_silence_and_a_broken_stream_are_its_own_too() -> None:
    def script(request: StepRequest) -> Script:
        return [0.1, Output([97]), PeerLost("gone")]

    (answer,) = ask(FakeDispatcher(script), ("/toy", "org/fake\nlive\nyou: hi"), config=ApiConfig(keepalive_s=0.07))
    assert answer.text == "...\nbegin\n+a\nbroken\nno: gone (unavailable, None)\n"


def test_a_trace_goes_on_in_another_dialect() -> None:
    dispatcher = FakeDispatcher(say("x"))
    first = {"model": "org/fake", "messages": [{"role": "user", "content": "hi"}]}
    ask(dispatcher, ("/v1/chat/completions", first), ("/toy", "org/fake\nwhole\nyou: hi\nme: x\nyou: more"))
    one, two = dispatcher.requests
    assert one.trace == two.trace
    assert two.prompt[: len(one.prompt)] == one.prompt


def imported(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                found |= {module, *(f"{module}.{name.name}" for name in names)}
            case ast.Import(names=names):
                found |= {name.name for name in names}
            case _:
                pass
    return found


@pytest.mark.parametrize("room", ["calls", "dispatch", "traces", "policy", "fleet"])
def test_nothing_below_a_dialect_knows_one(room: str) -> None:
    files = sorted((ROUTER / room).rglob("*.py"))
    assert files
    above = {path: {m for m in imported(path) if m.startswith(("router.dialects", "router.http"))} for path in files}
    assert not any(above.values()), above


def test_only_the_table_and_the_pages_of_a_dialect_name_it() -> None:
    shared = {"base", "body", "openai"}
    folders = {f"router.dialects.{path.name}" for path in (ROUTER / "dialects").iterdir() if path.is_dir()}
    dialects = {name for name in folders if name.rpartition(".")[2] not in {*shared, "__pycache__"}}
    names = ("chat", "completions", "messages", "responses", "tokens")
    assert dialects == {f"router.dialects.{name}" for name in names}
    naming = {
        path.relative_to(ROUTER).as_posix()
        for path in ROUTER.rglob("*.py")
        if not path.is_relative_to(ROUTER / "dialects")
        and any(module == name or module.startswith(f"{name}.") for module in imported(path) for name in dialects)
    }
    assert naming == {
        "http/app.py",
        "http/chats.py",
        "http/openapi.py",
        "http/outliving.py",
        "http/response_pages.py",
        "http/responses.py",
        "http/tokens.py",
    }
