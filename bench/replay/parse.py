"""Parsers of the formats that agent work is recorded in, to traces of steps. Pure.

A recording that does not say how long a person or a tool took has no gaps.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from bench.common.recordings import messages_of
from bench.replay.recording import Blocks, Messages, Step, Trace

MOONCAKE_BLOCK_TOKENS = 512


class _Request(msgspec.Struct):
    """A model call, or a subagent with calls of its own."""

    type: Literal["n", "s", "subagent"]
    input: int = msgspec.field(default=0, name="in")
    out: int = 0
    hash_ids: tuple[int, ...] = ()
    think_time: float | None = None
    agent_id: str = ""
    tool_tokens: int | None = None
    system_tokens: int | None = None
    requests: list["_Request"] = []


class _Weka(msgspec.Struct):
    id: str
    block_size: int
    requests: list[_Request]
    tool_tokens: int | None = None
    system_tokens: int | None = None


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def parse(documents: Iterable[tuple[str, bytes]]) -> list[Trace]:
    """The traces in these documents (name, bytes), in the order of the names; each is known by what it holds.

    Raises:
        ValueError: one is of no known format, or there is none.
    """
    traces: list[Trace] = []
    for name, data in sorted(documents):
        if name.endswith(".jsonl"):
            traces += mooncake(data)
        elif name.endswith(".json"):
            traces.append(_document(name, data))
    if not traces:
        raise ValueError("there is no recording here: no *.json, no *.jsonl")
    return traces


def _document(name: str, data: bytes) -> Trace:
    try:
        document: Any = msgspec.json.decode(data)
        if isinstance(document, dict) and "requests" in document:
            return weka(msgspec.convert(document, _Weka))
        if isinstance(document, dict) and "messages" in document:
            return mini_swe(name.removesuffix(".json").removesuffix(".traj"), document)
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is not a recording: {error}") from error
    raise ValueError(f"{name} is of no known format")


def weka(document: _Weka) -> Trace:
    """A coding agent's session: calls with the names of their prompts' blocks, and subagents."""
    first = next((request for request in document.requests if request.type != "subagent"), None)
    common = (document.tool_tokens or 0) + (document.system_tokens or 0)
    names = first.hash_ids[: common // document.block_size] if first is not None else ()
    steps = _weka_steps(document, document.requests, document.id, names, "main")
    return Trace(document.id, steps)


def _weka_steps(
    document: _Weka, requests: Sequence[_Request], trace: str, common: tuple[int, ...], kind: str
) -> tuple[Step, ...]:
    """Subagents start with the end of the call before them; those before the first call, with the first."""
    steps: list[Step] = []
    waiting: list[Trace] = []
    for request in requests:
        if request.type == "subagent":
            child = _subagent(document, request, trace)
            if child.steps:
                waiting.append(child)
            continue
        if steps and waiting:
            steps[-1] = msgspec.structs.replace(steps[-1], children=(*steps[-1].children, *waiting))
            waiting = []
        if request.input < 1 or request.out < 1:
            continue
        shared = next((i for i, name in enumerate(common) if request.hash_ids[i : i + 1] != (name,)), len(common))
        prompt = Blocks(document.id, request.hash_ids, document.block_size, request.input, shared, kind)
        steps.append(Step(prompt, request.out, request.think_time or 0.0 if steps else 0.0))
    if steps and waiting:
        steps[-1] = msgspec.structs.replace(steps[-1], children=(*steps[-1].children, *waiting))
    return tuple(steps)


def _subagent(document: _Weka, request: _Request, parent: str) -> Trace:
    trace = f"{parent}.{request.agent_id}"
    first = next((inner for inner in request.requests if inner.type != "subagent"), None)
    common = (request.tool_tokens or 0) + (request.system_tokens or 0)
    names = first.hash_ids[: common // document.block_size] if first is not None else ()
    return Trace(trace, _weka_steps(document, request.requests, trace, names, "sub"), parent)


def mooncake(data: bytes) -> list[Trace]:
    """Requests without sessions: each is a trace of one step, at its own time, in one scope of block names.

    Raises:
        ValueError: a line is no request.
    """
    traces: list[Trace] = []
    for number, line in enumerate(data.splitlines()):
        if not line.strip():
            continue
        try:
            request = msgspec.json.decode(line, type=_Mooncake)
        except msgspec.DecodeError as error:
            raise ValueError(f"line {number + 1} is no request: {error}") from error
        if request.input_length < 1 or request.output_length < 1:
            continue
        prompt = Blocks("recording", request.hash_ids, MOONCAKE_BLOCK_TOKENS, request.input_length)
        step = Step(prompt, request.output_length, 0.0)
        traces.append(Trace(f"request-{number}", (step,), start_s=request.timestamp / 1e3))
    return traces


def mini_swe(name: str, document: dict[str, Any]) -> Trace:
    """A trajectory in full text: a step per answer of the assistant, with all the messages before it.

    What is recorded is when each answer began. The gap is the time between two of those, so it holds the first one's
    generation too: an upper limit of what the tool took, to whole seconds.
    """
    messages = messages_of(document)
    steps: list[Step] = []
    before_s: float | None = None
    for place, message in enumerate(document["messages"]):
        if message["role"] != "assistant":
            continue
        response = (message.get("extra") or {}).get("response") or {}
        usage = response.get("usage") or {}
        created_s = response.get("created")
        prompt = tuple(messages[:place])
        tokens = usage.get("prompt_tokens") or sum(len(m["content"]) for m in prompt) // 4
        gap_s = max(0.0, created_s - before_s) if created_s is not None and before_s is not None else 0.0
        before_s = created_s
        output = usage.get("completion_tokens") or max(1, len(message["content"]) // 4)
        steps.append(Step(Messages(prompt, int(tokens)), int(output), float(gap_s)))
    return Trace(name, tuple(steps))
