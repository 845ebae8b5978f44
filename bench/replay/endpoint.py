"""Steps over HTTP: any server of OpenAI's form."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

import httpx
import msgspec

from bench.replay.recording import Blocks, Messages, Prompt, Trace
from bench.replay.records import StepRecord
from bench.replay.schedule import Sending
from bench.replay.tokens import prompt_text, prompt_tokens
from tracehaul.runtime import clock

JSON = {"Content-Type": "application/json"}
PROBE_TIMEOUT_S = 120.0
PROBE = Blocks("probe", (0,), 64, 64)
WARM_UP = Blocks("warm-up", tuple(range(10)), 60, 600)
DELTA_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls")
ERROR_CHARACTERS_MAX = 300
LINE_CHARACTERS_MAX = 1 << 22
STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
SESSION_HEADERS = ("X-Session-Id", "X-Session-Affinity", "X-Correlation-Id")
"""By which other routers tell sessions apart."""

Prompts = Literal["tokens", "text", "chat"]
Affinity = Literal["trace", "root"]


class Form(msgspec.Struct, frozen=True):
    """How a server takes prompts."""

    prompts: Prompts
    """``tokens`` and ``text``: on /v1/completions. ``chat``: as messages on /v1/chat/completions."""
    exact: bool
    """It can be told to generate as many tokens as were recorded."""


class NoEndpoint(Exception):
    """Nobody there serves completions of OpenAI's form; the text says what came instead."""


class _Failed(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


async def served_model(http: httpx.AsyncClient) -> str:
    """The first model that the server names.

    Raises:
        NoEndpoint: it names none.
    """
    try:
        answer = await http.get("/v1/models", timeout=PROBE_TIMEOUT_S)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise NoEndpoint(f"{http.base_url} names no model ({error}): name one with --model") from error


async def probe(http: httpx.AsyncClient, model: str, forms: Sequence[Form]) -> Form:
    """The first of these forms that the server takes.

    Raises:
        NoEndpoint: it takes none.
    """
    refused = ""
    for form in forms:
        try:
            path, body = _request(PROBE, model, form, 1, f"probe {clock.wall_ns()}")
            answer = await http.post(path, content=msgspec.json.encode(body), headers=JSON, timeout=PROBE_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise NoEndpoint(f"{http.base_url} does not answer: {error or type(error).__name__}") from error
        if answer.is_success:
            return form
        refused = f"{answer.status_code} {answer.text[:ERROR_CHARACTERS_MAX]}"
    raise NoEndpoint(f"{http.base_url} takes no completions: {refused}")


def candidate_forms(prompts: Prompts | None, traces: Sequence[Trace]) -> list[Form]:
    """What to try, the best first: recorded messages want a chat; blocks of tokens want to be token ids."""
    recorded = {type(step.prompt) for trace in traces for _, step in trace.walk()}
    kinds: list[Prompts] = [prompts] if prompts else ["chat"] if Messages in recorded else ["tokens", "text", "chat"]
    return [Form(kind, exact) for kind in kinds for exact in (True, False)]


class Endpoint:
    """One server, asked for steps. ``http`` has its base URL."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str,
        form: Form,
        *,
        salt: str = "",
        affinity: Affinity = "trace",
        timeout_s: float = 600.0,
    ) -> None:
        self._http = http
        self._model = model
        self._form = form
        self._salt = salt
        self._affinity = affinity
        self._timeout_s = timeout_s

    async def warm_up(self, requests: int) -> None:
        """Let the server have its first steps behind it, with prompts that no trace has.

        Raises:
            NoEndpoint: it refused one.
        """
        salts = [f"{clock.wall_ns()}/{number}" for number in range(requests)]
        calls = [_request(WARM_UP, self._model, self._form, 8, salt) for salt in salts]
        try:
            answers = await asyncio.gather(
                *(
                    self._http.post(path, content=msgspec.json.encode(body), headers=JSON, timeout=self._timeout_s)
                    for path, body in calls
                )
            )
        except httpx.HTTPError as error:
            raise NoEndpoint(f"a step to warm up with failed: {error or type(error).__name__}") from error
        for answer in answers:
            if not answer.is_success:
                raise NoEndpoint(f"a step to warm up with failed: {answer.text[:ERROR_CHARACTERS_MAX]}")

    async def send(self, sending: Sending, began_s: float) -> StepRecord:
        """One step, from request to end; whatever went wrong is in the record. ``began_s``: of the replay."""
        step, trace = sending.step, sending.trace
        path, body = _request(step.prompt, self._model, self._form, step.output_tokens, self._salt)
        content = msgspec.json.encode(body | STREAMED)
        sent_s = clock.perf_s()
        record = StepRecord(
            trace=trace.trace,
            parent=trace.parent,
            index=sending.index,
            due_s=sending.due_s,
            sent_s=sent_s - began_s,
            recorded_tokens=step.prompt.tokens,
            asked_tokens=step.output_tokens,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(path, content, self._headers(sending), record, sent_s)
        except _Failed as failed:
            record.error, record.detail = failed.kind, failed.detail
        except (TimeoutError, httpx.TimeoutException):
            record.error = "timeout"
        except httpx.ConnectError as error:
            record.error, record.detail = "connect", str(error)
        except httpx.HTTPError as error:
            record.error, record.detail = "cut off", str(error) or type(error).__name__
        record.ended_s = clock.perf_s() - began_s
        return record

    def _headers(self, sending: Sending) -> dict[str, str]:
        headers = JSON | {"X-Trace-Id": self._name(sending.trace.trace)}
        if sending.trace.parent is not None:
            headers["X-Parent-Trace-Id"] = self._name(sending.trace.parent)
        session = self._name(sending.root if self._affinity == "root" else sending.trace.trace)
        return headers | dict.fromkeys(SESSION_HEADERS, session)

    def _name(self, trace: str) -> str:
        return f"{trace}@{self._salt}" if self._salt else trace

    async def _stream(
        self, path: str, content: bytes, headers: dict[str, str], record: StepRecord, sent_s: float
    ) -> None:
        last_s: float | None = None
        async with self._http.stream("POST", path, content=content, headers=headers) as response:
            if not response.is_success:
                text = (await response.aread()).decode(errors="replace")
                raise _Failed(f"http {response.status_code}", text[:ERROR_CHARACTERS_MAX])
            async with aclosing(_events(response)) as events:
                async for event in events:
                    now_s = clock.perf_s()
                    _take_usage(event, record)
                    if not _says_something(event, first=last_s is None):
                        continue
                    if last_s is None:
                        record.ttft_s = now_s - sent_s
                    else:
                        record.itl_s.append(now_s - last_s)
                    last_s = now_s
        if last_s is None:
            raise _Failed("short", "no output")
        if self._form.exact and record.output_tokens != record.asked_tokens:
            raise _Failed("short", f"{record.output_tokens} of {record.asked_tokens} tokens")


async def _events(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream up to its end mark.

    Raises:
        _Failed: an event is an error, or is none, or the stream ends early.
    """
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        if len(data) > LINE_CHARACTERS_MAX:
            raise _Failed("malformed", f"an event of {len(data)} characters")
        try:
            event = msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise _Failed("malformed", f"{error}: {data[:80]}") from error
        if event.get("error"):
            raise _Failed("stream", str(event["error"])[:ERROR_CHARACTERS_MAX])
        yield event
    raise _Failed("cut off", "the stream ended without its mark")


def _says_something(event: dict[str, Any], *, first: bool) -> bool:
    """Whether it brings output. A chat's first event only says who speaks, and a last one only why it ends; a token
    may be no text yet, and where nothing came before the end, that was one."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            if choice.get("text") or first or not choice.get("finish_reason"):
                return True
        elif any(delta.get(field) for field in DELTA_FIELDS) or (first and choice.get("finish_reason")):
            return True
    return False


def _take_usage(event: dict[str, Any], record: StepRecord) -> None:
    usage = event.get("usage")
    if not usage:
        return
    record.output_tokens = int(usage.get("completion_tokens") or 0)
    record.prompt_tokens = usage.get("prompt_tokens")
    details = usage.get("prompt_tokens_details") or {}
    record.cached_tokens = details.get("cached_tokens")
    cost = (usage.get("tracehaul") or {}).get("cost") or {}
    record.cost, record.cost_unit = cost.get("amount"), cost.get("unit", "")


def _request(prompt: Prompt, model: str, form: Form, output_tokens: int, salt: str) -> tuple[str, dict[str, Any]]:
    """Path and body of one call, greedy."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": output_tokens,
        "temperature": 0,
    }
    if form.exact:
        body["ignore_eos"] = True
    match prompt:
        case Messages(messages):
            return "/v1/chat/completions", body | {"messages": messages}
        case Blocks():
            tokens = prompt_tokens(prompt, salt)
    if form.prompts == "tokens":
        return "/v1/completions", body | {"prompt": tokens.tolist()}
    text = prompt_text(tokens)
    if form.prompts == "text":
        return "/v1/completions", body | {"prompt": text}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
