"""The replay against our own HTTP surface, and against servers that misbehave."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import typer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bench.cli import app as bench_app
from bench.replay.endpoint import Form, NoEndpoint
from bench.replay.plot import plot
from bench.replay.recording import Blocks, Messages, Step, Trace
from bench.replay.run import Outcome, Progress, Target, replay
from bench.replay.schedule import Pacing
from cluster import cli, further
from router.calls.fakes import FakeDispatcher, FakeText, Script
from router.dispatch.steps import Finished, Output, StepRequest
from router.http.app import create_app
from router.http.config import ApiConfig
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import Overloaded
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import StepUsage

TARGET = Target("http://test", block_tokens=4)
PACING = Pacing(stagger_s=0, time_scale=1000)


class WideText(FakeText):
    """Knows every token id that a replay may send."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 50_000


def answers(request: StepRequest) -> Script:
    """As many tokens as asked for; the prompt's first half was cached."""
    count = request.sampling.max_tokens
    usage = StepUsage(request.prompt_tokens, count, computed_from=request.prompt_tokens // 2)
    return [*(Output([120], usage if at == 0 else None) for at in range(count)), Finished("length", usage)]


def blocks(*ids: int) -> Blocks:
    return Blocks("s", ids, 4, 4 * len(ids))


PARENT = Trace(
    "p",
    (
        Step(blocks(1, 2), 3, 0, (Trace("p.a", (Step(blocks(1, 2, 3), 2, 0),), "p"),)),
        Step(blocks(1, 2, 4), 2, 5),
    ),
)


def run(
    traces: list[Trace],
    script: Callable[[StepRequest], Script] = answers,
    target: Target = TARGET,
    observe: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Outcome, FakeDispatcher]:
    dispatcher = FakeDispatcher(script)
    app = create_app(dispatcher, {"org/fake": WideText()}, lambda: b"", ApiConfig(), InlineOffload())
    return _replay(traces, app, target, observe), dispatcher


def _replay(traces: list[Trace], app: Any, target: Target, observe: Callable[[Progress], None]) -> Outcome:
    async def main() -> Outcome:
        async with asyncio.timeout(20):
            return await replay(traces, PACING, target, observe, httpx.ASGITransport(app))

    return asyncio.run(main())


def test_a_tree_of_traces_is_replayed_as_token_ids_under_its_names(tmp_path: Path) -> None:
    seen: list[Progress] = []
    outcome, dispatcher = run([PARENT], observe=seen.append)
    assert outcome.form == Form("tokens", exact=True)
    asked = [request for request in dispatcher.requests if request.trace.startswith("p")]
    assert [(request.trace, request.parent, request.prompt_tokens) for request in asked] == [
        ("p", None, 8),
        ("p.a", "p", 12),
        ("p", None, 12),
    ]
    assert asked[1].prompt.startswith(asked[0].prompt)
    assert all(not request.sampling.stop_tokens for request in asked), "as many tokens as recorded"
    assert [record.error for record in outcome.records] == [None] * 3
    assert [record.output_tokens for record in outcome.records] == [3, 2, 2]
    assert outcome.hits is not None
    assert outcome.hits.delivered == pytest.approx(0.5)
    assert outcome.hits.shared == pytest.approx(16 / 32)
    assert [trace.trace for trace in outcome.completed] == ["p.a", "p"]
    assert seen[-1].steps == 3
    plot(outcome.records, outcome.hits, "a title", tmp_path / "replay.png")
    assert (tmp_path / "replay.png").stat().st_size > 10_000


def test_a_salt_changes_tokens_and_trace_ids() -> None:
    plain, salted = run([PARENT])[1], run([PARENT], target=msgspec.structs.replace(TARGET, salt="x"))[1]
    assert plain.requests[-1].prompt != salted.requests[-1].prompt
    assert salted.requests[-1].trace == "p@x"


def test_failed_steps_are_told_by_kind_and_their_traces_go_on() -> None:
    def script(request: StepRequest) -> Script:
        if request.trace == "p.a":
            return [Overloaded("full")]
        if request.trace == "p" and request.prompt_tokens == 8:
            return [Output([120]), Overloaded("full in mid-stream")]
        return answers(request)

    outcome, _ = run([PARENT], script)
    assert [record.error for record in outcome.records] == ["stream", "http 503", None]
    assert len(outcome.completed) == 2


def test_a_step_that_ends_early_is_an_error() -> None:
    def script(request: StepRequest) -> Script:
        usage = StepUsage(request.prompt_tokens, 1)
        return [Output([120], usage), Finished("stop", usage)] if request.prompt_tokens == 8 else answers(request)

    outcome, _ = run([PARENT], script)
    assert [(record.error, record.detail) for record in outcome.records] == [
        ("short", "1 of 3 tokens"),
        *[(None, "")] * 2,
    ]


def test_a_server_that_is_silent_or_talks_nonsense_fails_steps_in_time() -> None:
    async def complete(request: Request) -> Response:
        body = msgspec.json.decode(await request.body(), type=dict[str, Any])
        if not body.get("stream"):
            return Response("{}")
        match len(body["prompt"]), request.headers["x-trace-id"]:
            case 8, _:
                await asyncio.sleep(30)
                return Response("")
            case _, "p":
                return Response("data: {]\n\n")
            case _:
                return Response('data: {"choices": [{"text": "x"}]}\n\n')

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    target = msgspec.structs.replace(TARGET, model="m", timeout_s=0.3)
    outcome = _replay([PARENT], app, target, lambda progress: None)
    assert [record.error for record in outcome.records] == ["timeout", "cut off", "malformed"]


def test_recorded_messages_are_sent_as_a_chat() -> None:
    messages = ({"role": "user", "content": "hello"},)
    outcome, dispatcher = run([Trace("t", (Step(Messages(messages, 5), 4, 0),))])
    assert outcome.form.prompts == "chat"
    assert [record.error for record in outcome.records] == [None]
    assert bytes(t for t in unpack_tokens(dispatcher.requests[-1].prompt) if t < 256).decode().startswith("user\nhello")


def test_a_server_that_takes_neither_token_ids_nor_more_than_the_standard_gets_text() -> None:
    bodies: list[dict[str, Any]] = []

    async def complete(request: Request) -> Response:
        body = msgspec.json.decode(await request.body(), type=dict[str, Any])
        if not isinstance(body["prompt"], str) or "ignore_eos" in body:
            return Response("no", 400)
        bodies.append(body)
        usage = {"prompt_tokens": 9, "completion_tokens": 1}
        events = [{"choices": [{"text": "x", "finish_reason": "stop"}]}, {"choices": [], "usage": usage}]
        return Response(
            "".join(f"data: {msgspec.json.encode(event).decode()}\n\n" for event in events) + "data: [DONE]\n\n"
        )

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    target = msgspec.structs.replace(TARGET, url="http://test/v1", model="m")
    outcome = _replay([PARENT], app, target, lambda progress: None)
    assert outcome.form == Form("text", exact=False)
    assert [record.error for record in outcome.records] == [None] * 3
    assert outcome.hits is None, "nobody tells of cached tokens"
    assert bodies[-1]["stream_options"] == {"include_usage": True}


def test_no_server_is_said_in_one_line() -> None:
    async def main() -> None:
        await replay([PARENT], PACING, Target("http://127.0.0.1:9", model="m"))

    with pytest.raises(NoEndpoint, match="does not answer"):
        asyncio.run(main())


def test_the_command_is_added_by_its_entry_point(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Point:
        name = "bench"

        def load(self) -> typer.Typer:
            return bench_app

    def points(group: str) -> list[Point]:
        assert group == "tracehaul.commands"
        return [Point()]

    cli.commands()  # all that are not this one stay
    monkeypatch.setattr(further, "entry_points", points)
    monkeypatch.setattr(cli.app, "registered_groups", list(cli.app.registered_groups))
    monkeypatch.setattr("sys.argv", ["tracehaul", "bench", "replay", "--recordings", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "there is no recording here" in capsys.readouterr().err
