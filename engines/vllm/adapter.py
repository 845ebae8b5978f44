"""vLLM's completions, as of 0.32. Pure.

Names are those of ``vllm/entrypoints``: ``openai/completion/protocol.py`` and ``serving.py``, errors
``serve/engine/protocol.py``; of its metrics ``vllm/v1/metrics/loggers.py``.
"""

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import msgspec

from engines.adapter.dialect import Ask, Cached, Chunk, Facts, Figures, Reader, Request, failure, scored, unreadable
from engines.adapter.footprint import Footprint, last_said, number, ranks
from engines.vllm.chains import SALT_CHARACTERS_MAX, SELF_TEST, spelled
from tracehaul.wire.errors import InvalidRequest, PeerLost
from tracehaul.wire.steps import Constraint, FinishReason, TokenLogprobs

PLUGIN = ("engines.vllm.plugin", "TracehaulConnector")
"""Its module and class."""
BLOCK_TOKENS = 32
PRIORITY_MS = 1 << 40
"""Due times within one priority never reach the next."""

_PLACEHOLDER = "token_id:"
_SAMPLE = re.compile(rb"^vllm:(\w+)(?:\{([^}]*)\})? ([0-9.eE+-]+)", re.MULTILINE)
_LABEL = re.compile(rb'(\w+)="([^"]*)"')


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []


class _Likely(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, _Likely] | None] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: int = 500


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _Card(msgspec.Struct):
    id: str
    root: str | None = None
    max_model_len: int | None = None
    parent: str | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class _Version(msgspec.Struct):
    version: str = ""


_events = msgspec.json.Decoder(_Event)
_cards = msgspec.json.Decoder(_Cards)
_versions = msgspec.json.Decoder(_Version)


class VLLM:
    """Implements :class:`engines.adapter.dialect.Dialect`. ``priorities``: it was started to schedule by these."""

    name = "vllm"
    tested: Sequence[str] = ("0.32.",)
    alive_path = "/health"
    load_path = "/metrics"
    deep_path = None
    fact_paths: Sequence[str] = ("/v1/models", "/version", "/metrics")
    environment: Mapping[str, str] = {"PYTHONHASHSEED": "0", "VLLM_NO_USAGE_STATS": "1"}

    def __init__(self, *, priorities: bool = False) -> None:
        self._priorities = priorities

    def facts(self, answers: Sequence[bytes]) -> Facts:
        try:
            cards, version = _cards.decode(answers[0]).data, _versions.decode(answers[1]).version
        except msgspec.MsgspecError as error:
            raise unreadable("what it is", answers[0]) from error
        card = next((card for card in cards if card.parent is None), None)
        if card is None or not card.max_model_len:
            raise unreadable("what it is", answers[0])
        capacity = _capacity(_SAMPLE.findall(answers[2]))
        return Facts(version, card.id, card.root or card.id, card.max_model_len, capacity, 0, self._priorities)

    def figures(self, answer: bytes) -> Figures:
        samples = _SAMPLE.findall(answer)
        sums: dict[str, float] = {}
        try:
            for name, _, value in samples:
                sums[name.decode()] = sums.get(name.decode(), 0.0) + float(value)
        except ValueError as error:
            raise unreadable("what its load is", answer) from error
        if "num_requests_running" not in sums or not all(map(isfinite, sums.values())):
            raise unreadable("what its load is", answer)
        return Figures(
            running=int(sums["num_requests_running"]),
            waiting=int(sums.get("num_requests_waiting", 0)),
            used_tokens=int(sums.get("kv_cache_usage_perc", 0.0) * _capacity(samples)),
            prefill_s=sums.get("request_prefill_time_seconds_sum", 0.0),
            prefill_tokens=int(sums.get("request_prefill_kv_computed_tokens_sum", 0)),
            decode_s=sums.get("inter_token_latency_seconds_sum", 0.0),
            decode_steps=int(sums.get("inter_token_latency_seconds_count", 0)),
        )

    def request(self, ask: Ask, facts: Facts) -> Request:
        sampling = ask.sampling
        streams = ask.prompt_logprobs is None  # it streams no answer whose prompt is scored
        body: dict[str, Any] = {
            "model": facts.model,
            "request_id": ask.rid,
            "session_id": ask.trace,
            "prompt": ask.tokens,
            "stream": streams,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "max_tokens": ask.max_new,
            "min_tokens": ask.min_new,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "stop_token_ids": list(sampling.stop_tokens),
            "ignore_eos": True,  # the model's own end tokens are among those
            "skip_special_tokens": False,
        }
        if streams:
            body["stream_options"] = {"include_usage": True}
        else:
            body["prompt_logprobs"] = ask.prompt_logprobs
        if sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
        if sampling.seeded:
            body["seed"] = sampling.seed
        if sampling.constraint is not None:
            body["structured_outputs"] = _constrained(sampling.constraint)
        if ask.salt:
            body["cache_salt"] = _spelled(ask.salt)
        if facts.priorities:  # there the lower goes first
            body["priority"] = round(1e3 * ask.due_s) - ask.priority * PRIORITY_MS
        return Request("/v1/completions", msgspec.json.encode(body), streams)

    def reader(self, ask: Ask) -> Reader:
        return _Reader(ask)

    def abort(self, rid: str) -> Request | None:
        return None

    def afresh(self, nonce: str, turn: int) -> tuple[str, Request | None]:
        return f"{SELF_TEST}{nonce}#{turn}", None

    def from_store(self, cached: Cached) -> int:
        return cached.tokens  # it tells one number

    def command(self, model: str, name: str, port: int, args: Sequence[str]) -> list[str]:
        fixed = ["--model", model, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
        how = ["--enable-prompt-tokens-details", "--generation-config", "vllm", "--scheduling-policy", "priority"]
        return ["-m", "vllm.entrypoints.openai.api_server", *fixed, *how, *args]

    def sharing(self, options: Mapping[str, object]) -> list[str]:
        config = {
            "kv_connector": PLUGIN[1],
            "kv_connector_module_path": PLUGIN[0],
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": dict(options),
        }
        return ["--block-size", str(BLOCK_TOKENS), "--kv-transfer-config", msgspec.json.encode(config).decode()]

    def footprint(self, args: Sequence[str], token_bytes: int, *, shares: bool) -> Footprint:
        count = ranks(
            args,
            ("--tensor-parallel-size", "-tp"),
            ("--pipeline-parallel-size", "-pp"),
            ("--data-parallel-size", "-dp"),
        )
        option = "--kv-cache-memory-bytes"  # of each rank
        return Footprint(int(number(last_said(args, option))) * count, 0, count, f"{option} in engine_args")


def _spelled(salt: str) -> str:
    said = spelled(salt)
    if len(said) > SALT_CHARACTERS_MAX:
        raise InvalidRequest(
            f"cache_salt is too long: vLLM takes {SALT_CHARACTERS_MAX} characters, a key's tenant included"
        )
    return said


def _constrained(constraint: Constraint) -> dict[str, Any]:
    if constraint.thinking != "none":
        raise InvalidRequest("vLLM cannot keep an answer to a schema or grammar after the model has reasoned")
    match constraint.kind:
        case "json_schema":
            return {"json": constraint.source}
        case "regex":
            return {"regex": constraint.source}
        case "grammar":
            return {"grammar": constraint.source}


def _capacity(samples: Sequence[tuple[bytes, bytes, bytes]]) -> int:
    """KV memory in tokens, of all its engines."""
    tokens = 0
    for name, labels, _ in samples:
        if name == b"cache_config_info":
            said = dict(_LABEL.findall(labels))
            blocks, size = said.get(b"num_gpu_blocks", b""), said.get(b"block_size", b"")
            tokens += int(blocks) * int(size) if blocks.isdigit() and size.isdigit() else 0
    return tokens


class _Reader:
    """Events are what is new; of a prompt that is scored, one body has all."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def read(self, data: bytes) -> Chunk:
        try:
            event = _events.decode(data)
        except msgspec.MsgspecError as error:
            raise unreadable("a step", data) from error
        if event.error is not None:
            raise failure(event.error.code, event.error.message)
        details = event.usage.prompt_tokens_details if event.usage is not None else None
        cached = None if details is None or details.cached_tokens is None else Cached(details.cached_tokens)
        if not event.choices:
            if event.usage is None:
                raise unreadable("a step", data)
            return Chunk(cached=cached)
        choice = event.choices[0]
        if choice.token_ids is None:
            raise unreadable("a step", data)
        finish = _finish(choice.finish_reason)
        return Chunk(choice.token_ids, self._logprobs(choice), self._scores(choice), cached, finish)

    def _logprobs(self, choice: _Choice) -> list[TokenLogprobs] | None:
        top, told = self._ask.sampling.logprobs, choice.logprobs
        if top is None:
            return None
        if told is None or len(told.token_logprobs) != len(choice.token_ids or ()):
            raise InvalidRequest("the engine's server told no logprobs")
        likely = told.top_logprobs or [None] * len(told.token_logprobs)
        return [scored(own, _pairs(best), top) for own, best in zip(told.token_logprobs, likely, strict=True)]

    def _scores(self, choice: _Choice) -> list[TokenLogprobs]:
        top, tokens = self._ask.prompt_logprobs, self._ask.tokens
        if top is None or choice.prompt_logprobs is None:
            return []
        scores: list[TokenLogprobs] = []
        for at in range(1, min(len(choice.prompt_logprobs), self._ask.prompt_tokens)):
            likely = {int(token): item.logprob for token, item in (choice.prompt_logprobs[at] or {}).items()}
            scores.append(scored(likely.get(tokens[at]), list(likely.items()), top))
        return scores


def _pairs(items: Mapping[str, float] | None) -> list[tuple[int, float]]:
    pairs = [(name.removeprefix(_PLACEHOLDER), logprob) for name, logprob in (items or {}).items()]
    return [(int(name), logprob) for name, logprob in pairs if name.isdigit()]


def _finish(reason: str | None) -> FinishReason | None:
    match reason:
        case None:
            return None
        case "length":
            return "length"
        case "abort" | "error":
            raise PeerLost(f"the engine's server ended it: {reason}")
        case _:
            return "stop"
