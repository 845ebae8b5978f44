"""SGLang's own HTTP interface, as of 0.5.23. Pure.

Names are those of ``sglang/srt``: requests ``managers/io_struct.py`` (GenerateReqInput, AbortReq) and
``sampling/sampling_params.py``, answers ``managers/tokenizer_manager.py``, load ``managers/load_snapshot.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engines.adapter.dialect import Ask, Cached, Chunk, Facts, Figures, Reader, Request, failure, scored, unreadable
from engines.adapter.footprint import Footprint, last_said, number, ranks
from tracehaul.wire.errors import InvalidRequest, PeerLost
from tracehaul.wire.steps import Constraint, FinishReason

PLUGIN = ("engines.sglang.plugin", "TracehaulStorage")
"""Its module and class."""
BLOCK_TOKENS = 32
HICACHE_RATIO = 2.0
"""Host pages to one of its own, where nobody says otherwise."""

Item = tuple[float | None, int, str | None]
"""A token's logarithm, its id, and its text where that is asked for."""


class _Finish(msgspec.Struct):
    type: str
    message: str = ""
    status_code: int | None = None


class _Details(msgspec.Struct):
    device: int = 0
    host: int = 0
    storage: int = 0


class _Meta(msgspec.Struct):
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: _Finish | None = None
    cached_tokens_details: _Details | None = None
    output_token_logprobs: list[Item] = []
    output_top_logprobs: list[list[Item] | None] = []
    input_token_logprobs: list[Item] = []
    input_top_logprobs: list[list[Item] | None] = []


class _Error(msgspec.Struct):
    message: str
    code: int = 500


class _Event(msgspec.Struct):
    output_ids: list[int] = []
    meta_info: _Meta | None = None
    error: _Error | None = None


class _Info(msgspec.Struct):
    max_total_num_tokens: int
    max_req_input_len: int
    version: str = ""
    model_path: str = ""
    served_model_name: str | None = None
    max_running_requests: int | None = None
    enable_priority_scheduling: bool = False


class _Load(msgspec.Struct):
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_used_tokens: int = 0
    gen_throughput: float = 0.0
    total_prefill_uncached_tokens: int = 0
    total_prefill_busy_us: int = 0


class _Loads(msgspec.Struct):
    loads: list[_Load]


_events = msgspec.json.Decoder(_Event)
_infos = msgspec.json.Decoder(_Info)
_loads = msgspec.json.Decoder(_Loads)


class SGLang:
    """Implements :class:`engines.adapter.dialect.Dialect`."""

    name = "sglang"
    tested: Sequence[str] = ("0.5.23",)
    alive_path = load_path = "/v1/loads?include=core"
    deep_path = "/health"
    """It asks the scheduler for a token, and waits a second at least."""
    fact_paths: Sequence[str] = ("/server_info",)
    environment: Mapping[str, str] = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
    """Before temperature, as ours are."""

    def __init__(self, ends: Sequence[int] = ()) -> None:
        """``ends``: the model's own end tokens, at which it stops with those of a request or not at all."""
        self._ends = frozenset(ends)

    def facts(self, answers: Sequence[bytes]) -> Facts:
        try:
            info = _infos.decode(answers[0])
        except msgspec.MsgspecError as error:
            raise unreadable("what it is", answers[0]) from error
        return Facts(
            info.version,
            info.served_model_name or info.model_path,
            info.model_path,
            info.max_req_input_len,
            info.max_total_num_tokens,
            info.max_running_requests or 0,
            info.enable_priority_scheduling,
        )

    def figures(self, answer: bytes) -> Figures:
        try:
            loads = _loads.decode(answer).loads  # one for each data parallel rank
        except msgspec.MsgspecError as error:
            raise unreadable("what its load is", answer) from error
        return Figures(
            running=sum(load.num_running_reqs for load in loads),
            waiting=sum(load.num_waiting_reqs for load in loads),
            used_tokens=sum(load.num_used_tokens for load in loads),
            prefill_s=sum(load.total_prefill_busy_us for load in loads) / 1e6,
            prefill_tokens=sum(load.total_prefill_uncached_tokens for load in loads),
        )

    def request(self, ask: Ask, facts: Facts) -> Request:
        sampling = ask.sampling
        params: dict[str, Any] = {
            "max_new_tokens": ask.max_new,
            "min_new_tokens": ask.min_new,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "stop_token_ids": list(sampling.stop_tokens),
            # True: none of these counts there, and who asks ends it. False: the model's own count, too.
            "ignore_eos": not (self._ends and self._ends.issubset(sampling.stop_tokens)),
            "skip_special_tokens": False,
            "no_stop_trim": True,
        }
        if sampling.logit_bias:
            params["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
        if sampling.seeded:
            params["sampling_seed"] = sampling.seed
        if sampling.constraint is not None:
            params |= _constrained(sampling.constraint)
        body: dict[str, Any] = {
            "rid": ask.rid,
            "session_id": ask.trace,
            "input_ids": ask.tokens,
            "stream": True,
            "sampling_params": params,
        }
        if ask.salt:
            body["cache_salt"] = ask.salt
        if ask.priority and facts.priorities:
            body["priority"] = ask.priority
        top = max(sampling.logprobs or 0, ask.prompt_logprobs or 0)
        if sampling.logprobs is not None or ask.prompt_logprobs is not None:
            body |= {"return_logprob": True, "top_logprobs_num": top}
            body["logprob_start_len"] = -1 if ask.prompt_logprobs is None else 0
        return Request("/generate", msgspec.json.encode(body))

    def reader(self, ask: Ask) -> Reader:
        return _Reader(ask)

    def abort(self, rid: str) -> Request | None:
        return Request("/abort_request", msgspec.json.encode({"rid": rid}))

    def afresh(self, nonce: str, turn: int) -> tuple[str, Request | None]:
        return nonce, Request("/flush_cache", b"", streams=False)

    def from_store(self, cached: Cached) -> int:
        return cached.store

    def command(self, model: str, name: str, port: int, args: Sequence[str]) -> list[str]:
        fixed = ["--model-path", model, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
        how = ["--enable-cache-report", "--incremental-streaming-output", "--grammar-backend", "llguidance"]
        return ["-m", "sglang.launch_server", *fixed, *how, *args]

    def sharing(self, options: Mapping[str, object]) -> list[str]:
        named = {"backend_name": "tracehaul", "module_path": PLUGIN[0], "class_name": PLUGIN[1], "interface_v1": 1}
        extra = msgspec.json.encode(named | dict(options)).decode()
        tier = ["--enable-hierarchical-cache", "--hicache-io-backend", "direct"]
        tier += ["--hicache-mem-layout", "page_first_direct", "--hicache-write-policy", "write_through"]
        storage = ["--hicache-storage-backend", "dynamic", "--hicache-storage-prefetch-policy", "wait_complete"]
        page = ["--page-size", str(BLOCK_TOKENS)]
        return [*page, *tier, *storage, "--hicache-storage-backend-extra-config", extra]

    def footprint(self, args: Sequence[str], token_bytes: int, *, shares: bool) -> Footprint:
        tp, pp = ("--tensor-parallel-size", "--tp-size", "--tp"), ("--pipeline-parallel-size", "--pp-size")
        count = ranks(args, tp, pp)
        kv = int(number(last_said(args, "--max-total-tokens"))) * token_bytes
        pages = 0
        if shares:
            size_gb = number(last_said(args, "--hicache-size"))
            ratio = number(last_said(args, "--hicache-ratio"), HICACHE_RATIO)
            pages = int(size_gb * 1e9) * count if size_gb else int(ratio * kv)
        return Footprint(kv, pages, count, "--max-total-tokens and --hicache-ratio in engine_args")


def _constrained(constraint: Constraint) -> dict[str, str]:
    if constraint.thinking != "none":
        raise InvalidRequest("SGLang cannot keep an answer to a schema or grammar after the model has reasoned")
    match constraint.kind:
        case "json_schema":
            return {"json_schema": constraint.source}
        case "regex":
            return {"regex": constraint.source}
        case "grammar":
            return {"ebnf": constraint.source}


class _Reader:
    """Events are what is new, or all so far, as the server was started: their last tokens are new in both."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._told = 0
        self._scored = ask.prompt_logprobs is None

    def read(self, data: bytes) -> Chunk:
        try:
            event = _events.decode(data)
        except msgspec.MsgspecError as error:
            raise unreadable("a step", data) from error
        if event.error is not None:
            raise failure(event.error.code, event.error.message)
        meta = event.meta_info
        if meta is None:
            raise unreadable("a step", data)
        new = max(0, meta.completion_tokens - self._told)
        if new > len(event.output_ids):
            raise unreadable("a step", data)
        self._told += new
        finish = _finish(meta.finish_reason)
        tokens = event.output_ids[len(event.output_ids) - new :]
        return Chunk(tokens, self._logprobs(meta, new), self._scores(meta), _cached(meta), finish)

    def _logprobs(self, meta: _Meta, new: int) -> list[Any] | None:
        top = self._ask.sampling.logprobs
        if top is None:
            return None
        items, likely = meta.output_token_logprobs, meta.output_top_logprobs
        items = items[len(items) - new :] if len(items) >= new else []
        if len(items) < new:
            raise InvalidRequest("the engine's server told no logprobs")
        likely = likely[len(likely) - new :] if len(likely) >= new else [None] * new
        return [scored(item[0], _pairs(best), top) for item, best in zip(items, likely, strict=True)]

    def _scores(self, meta: _Meta) -> list[Any]:
        if self._scored or not meta.input_token_logprobs:
            return []
        self._scored = True
        top, end = self._ask.prompt_logprobs or 0, self._ask.prompt_tokens
        items = meta.input_token_logprobs[1:end]  # nothing precedes the first
        likely = meta.input_top_logprobs[1:end] or [None] * len(items)
        return [scored(item[0], _pairs(best), top) for item, best in zip(items, likely, strict=True)]


def _pairs(items: Sequence[Item] | None) -> list[tuple[int, float]]:
    return [(token, logprob) for logprob, token, _ in items or () if logprob is not None]


def _cached(meta: _Meta) -> Cached:
    details = meta.cached_tokens_details
    if details is None:
        return Cached(meta.cached_tokens)
    return Cached(details.device, details.host, details.storage)


def _finish(finish: _Finish | None) -> FinishReason | None:
    match finish:
        case None:
            return None
        case _Finish(type="length"):
            return "length"
        case _Finish(type="abort"):
            if finish.status_code is not None and finish.status_code >= 400:
                raise failure(finish.status_code, finish.message)
            raise PeerLost(f"the engine's server aborted it: {finish.message}")
        case _:
            return "stop"
