"""Stock servers as a worker sees them: the HTTP of SGLang and of vLLM, over a fake engine that proves its bytes.

Every field of what they answer is as the servers' own sources make it, and no other is made up. SGLang 0.5.23
(``sglang/srt``): events of ``/generate`` in ``managers/tokenizer_manager.py`` (``_handle_batch_output``,
``add_logprob_to_meta_info``, ``_handle_abort_req``), how they end in ``managers/schedule_batch.py``
(``FINISH_MATCHED_TOKEN``, ``FINISH_LENGTH``, ``FINISH_ABORT``), hits in ``managers/scheduler_components/
output_streamer.py`` (``get_cached_tokens_details``), errors in ``entrypoints/http_server.py`` (``stream_results``),
``/v1/loads`` in ``entrypoints/v1_loads.py`` and ``managers/load_snapshot.py`` (``LoadSnapshot``), ``/server_info`` in
``entrypoints/http_server.py`` and ``utils/common.py`` (``build_server_info``). vLLM 0.32.0 (``vllm/entrypoints``):
``openai/completion/protocol.py`` (``CompletionStreamResponse``, ``CompletionResponse``) and ``serving.py``, errors in
``serve/engine/protocol.py`` (``ErrorInfo``), ``/v1/models`` there (``ModelCard``), ``/version`` in
``serve/instrumentator/basic.py``; metrics in ``vllm/v1/metrics/loggers.py``. Both were read, and none of them run.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from kvstore.client.client import StoreClient
from kvstore.client.writer import OutgoingBlock
from tracehaul.engine.base import Result, Scoring, Work
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info
from tracehaul.engine.history import History
from tracehaul.wire.hashing import chain, common_prefix, pack_tokens, unpack_tokens
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.steps import Constraint, Sampling

MODEL = "fake"
PAGE = 8
BUFFERS = 8
TIMEOUT_S = 5.0


class StockEngine:
    """What both have inside: one fake engine, a prefix cache, and blocks in a store where a client is given."""

    def __init__(self, cost: EngineCost | None = None, store: StoreClient | None = None) -> None:
        self.engine = FakeEngine(fake_info(kv_tokens_max=16384), cost)
        self.store = store
        self.turn = asyncio.Lock()
        self.asked: list[dict[str, Any]] = []
        """Bodies of all requests for steps."""
        self.running: dict[str, asyncio.Event] = {}
        """What ends each request that runs."""
        self.ended: list[str] = []
        self.frozen = asyncio.Event()
        """Set while it is not."""
        self.frozen.set()
        self.stalled = asyncio.Event()
        """The same, of its engine alone."""
        self.stalled.set()
        self.fail = ""
        """How the next request for a step fails."""
        self.publish_after_s = 0.0
        self.put: set[BlockHash] = set()
        self.prefill_tokens = 0
        self.decoded = 0
        self.ran: list[bytes] = []
        self.tasks: set[asyncio.Task[None]] = set()

    async def generate(
        self, rid: str, tokens: list[int], sampling: Sampling, salt: str, scores_top: int | None
    ) -> AsyncGenerator[tuple[Result, int, int], None]:
        """Results, each with the tokens found in its own memory and in the store."""
        engine, stop = self.engine, asyncio.Event()
        self.running[rid] = stop
        sequence = engine.open(len(tokens) + sampling.max_tokens)
        assert sequence is not None
        try:
            packed = pack_tokens(tokens)
            device = max((common_prefix(packed, other) for other in self.ran), default=0)
            device = 0 if scores_top is not None else min(device, len(tokens) - 1) // PAGE * PAGE
            if device:
                await self._step(Work(sequence, tokens[:device]))
            stored = await self._pull(sequence, packed, device, salt) if scores_top is None else 0
            history = History.of(sampling, tokens, 0)
            guide = None if sampling.constraint is None else await engine.guide(sampling.constraint, [])
            rest, emitted = tokens[device + stored :], 0
            self.prefill_tokens += len(rest)
            scoring = None if scores_top is None else Scoring(tokens[1:], scores_top)
            while not stop.is_set():
                await self.stalled.wait()
                work = Work(sequence, rest, sampling, emitted, history, scoring, guide)
                result = await self._step(work)
                if emitted == 0:
                    self.ran.append(packed)
                    task = asyncio.create_task(self._put(packed, salt))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)
                assert result.token is not None, result.error
                emitted += 1
                self.decoded += 1
                if history is not None:
                    history.add(result.token)
                yield result, device, stored
                if emitted == sampling.max_tokens or (
                    result.token in sampling.stop_tokens and emitted >= sampling.min_tokens
                ):
                    return
                rest, scoring = [result.token], None
        finally:
            self.running.pop(rid)
            self.ended.append(rid)
            async with self.turn:  # what was computed for it has ended
                engine.close(sequence)

    async def _step(self, work: Work) -> Result:
        async with self.turn:
            return (await self.engine.run([work]))[0]

    async def _pull(self, sequence: Any, packed: bytes, start: int, salt: str) -> int:
        if self.store is None:
            return 0
        layout = self.engine.info.layout
        hashes = chain(layout.root(salt), packed[:-4], layout.block_tokens)[start // PAGE :]
        holders = await self.store.exists(hashes)
        count = next((at for at, holder in enumerate(holders) if holder is None), len(hashes))
        for at in range(count):
            (buffer,) = await self.store.staging.acquire(1, TIMEOUT_S)
            try:
                (got,) = await self.store.get([hashes[at]], [buffer], TIMEOUT_S, [holders[at]])
                assert got == layout.block_bytes
                view = [buffer.view(layout.block_bytes)]
                await self.engine.unpack(sequence, start + at * PAGE, PAGE, view)
            finally:
                self.store.staging.release([buffer])
        return count * PAGE

    async def _put(self, packed: bytes, salt: str) -> None:
        """Its plugin writes through, some time after the answer."""
        if self.store is None:
            return
        await asyncio.sleep(self.publish_after_s)
        layout = self.engine.info.layout
        hashes = [layout.root(salt), *chain(layout.root(salt), packed, layout.block_tokens)]
        new = [at for at in range(1, len(hashes)) if hashes[at] not in self.put]
        if not new:
            return
        self.put.update(hashes)
        ids = unpack_tokens(packed)
        sequence = self.engine.open(len(ids))
        assert sequence is not None
        await self._step(Work(sequence, ids))
        for group in (new[at : at + BUFFERS] for at in range(0, len(new), BUFFERS)):
            buffers = await self.store.staging.acquire(len(group), TIMEOUT_S)
            try:
                for at, buffer in zip(group, buffers, strict=True):
                    await self.engine.pack(sequence, (at - 1) * PAGE, PAGE, [buffer.view(layout.block_bytes)])
                blocks = [
                    OutgoingBlock(hashes[at], hashes[at - 1], buffer, layout.block_bytes)
                    for at, buffer in zip(group, buffers, strict=True)
                ]
                assert set(await self.store.put(None, blocks, TIMEOUT_S)) <= {"published", "present"}
            finally:
                self.store.staging.release(buffers)
        self.engine.close(sequence)


def _sampling(body: dict[str, Any], names: dict[str, str], tops: int | None, constraint: Constraint | None) -> Sampling:
    said = {ours: body[theirs] for ours, theirs in names.items() if body.get(theirs) is not None}
    assert body["ignore_eos"] is True
    return Sampling(
        **said,
        top_k=max(0, body["top_k"]),
        stop_tokens=tuple(body["stop_token_ids"]),
        logit_bias=tuple((int(token), bias) for token, bias in (body.get("logit_bias") or {}).items()),
        constraint=constraint,
        logprobs=tops,
    )


SAME = {
    name: name
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
}


def event(data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


class SGLangServer:
    """``incremental``: as started with ``--incremental-streaming-output``."""

    def __init__(self, engine: StockEngine, *, incremental: bool = True) -> None:
        self.engine = engine
        self.incremental = incremental

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/generate", self.generate, methods=["POST"]),
                Route("/abort_request", self.abort, methods=["POST"]),
                Route("/v1/loads", self.loads),
                Route("/health", self.health),
                Route("/server_info", self.info),
            ]
        )

    async def health(self, request: Request) -> Response:
        await self.engine.frozen.wait()
        try:
            async with asyncio.timeout(0.2):  # twenty seconds there
                await self.engine.stalled.wait()
        except TimeoutError:
            return Response(status_code=503)
        return Response(status_code=200)

    async def info(self, request: Request) -> Response:
        await self.engine.frozen.wait()
        info = self.engine.engine.info
        return JSONResponse(
            {
                "model_path": "/models/fake",
                "served_model_name": MODEL,
                "page_size": PAGE,
                "max_running_requests": 16,
                "enable_priority_scheduling": False,
                "launch_command": "",
                "status": "ready",
                "max_total_num_tokens": info.kv_tokens_max,
                "max_req_input_len": info.context_max,
                "kv_events": None,
                "startup_time": 1.0,
                "internal_states": [],
                "version": "0.5.23",
                "frontend": "python",
            }
        )

    async def loads(self, request: Request) -> Response:
        await self.engine.frozen.wait()
        assert request.query_params["include"] == "core"
        used = self.engine.engine.info.kv_tokens_max - self.engine.engine.free_tokens
        load = {
            "timestamp": 1.0,
            "dp_rank": 0,
            "num_running_reqs": len(self.engine.running),
            "num_waiting_reqs": 0,
            "num_waiting_uncached_tokens": 0,
            "num_used_tokens": used,
            "num_total_tokens": used,
            "num_active_tokens": used,
            "num_prealloc_ready_tokens": 0,
            "max_total_num_tokens": self.engine.engine.info.kv_tokens_max,
            "max_running_requests": 16,
            "token_usage": 0.0,
            "gen_throughput": 0.0,
            "cache_hit_rate": 0.0,
            "utilization": 0.0,
            "total_prefill_uncached_tokens": self.engine.prefill_tokens,
            "total_prefill_busy_us": self.engine.prefill_tokens * 1000,
            "decode_moments": None,
        }
        answer = {"timestamp": "", "version": "0.5.23", "accelerator": None, "num_accelerators": 1, "loads": [load]}
        return JSONResponse(answer)

    async def abort(self, request: Request) -> Response:
        await self.engine.frozen.wait()
        stop = self.engine.running.get((await request.json())["rid"])
        if stop is not None:
            stop.set()
        return Response(status_code=200)

    async def generate(self, request: Request) -> Response:
        await self.engine.frozen.wait()
        body = await request.json()
        self.engine.asked.append(body)
        fail, self.engine.fail = self.engine.fail, ""
        match fail:
            case "500":
                return JSONResponse({"error": {"message": "CUDA error"}}, status_code=500)
            case "503":
                return JSONResponse({"detail": "The request queue is full."}, status_code=503)
            case "garbage":
                return StreamingResponse(iter([b"data: {]\n\n"]), media_type="text/event-stream")
            case _:
                return StreamingResponse(self.events(body, fail), media_type="text/event-stream")

    async def events(self, body: dict[str, Any], fail: str) -> AsyncGenerator[bytes, None]:
        tokens, params, rid = body["input_ids"], body["sampling_params"], body["rid"]
        if fail == "400" or len(tokens) >= self.engine.engine.info.context_max:
            said = "temperature must be a non-negative finite number"
            if fail != "400":
                said = f"The input ({len(tokens)} tokens) is longer than the model's context length (1024 tokens)."
            error = {"message": said, "type": "invalid_request_error", "code": 400, "retryable": False}
            yield event({"error": error}) + b"data: [DONE]\n\n"
            return
        scores_top = body.get("top_logprobs_num", 0) if body.get("logprob_start_len", -1) == 0 else None
        kinds = {"json_schema": "json_schema", "regex": "regex", "ebnf": "grammar"}
        constraint = next((Constraint(kind, params[name]) for name, kind in kinds.items() if name in params), None)
        names = SAME | {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
        tops = body["top_logprobs_num"] if body.get("return_logprob") else None
        sampling = _sampling(params, names, tops, constraint)
        told: dict[str, list[Any]] = {"ids": [], "output_token_logprobs": [], "output_top_logprobs": []}
        inputs: dict[str, Any] = {}
        async with contextlib.aclosing(
            self.engine.generate(rid, tokens, sampling, body.get("cache_salt", ""), scores_top)
        ) as results:
            async for result, device, stored in results:
                assert result.token is not None
                told["ids"].append(result.token)
                if result.logprobs is not None:
                    own, top = result.logprobs.logprob, result.logprobs.top
                    told["output_token_logprobs"].append([own, result.token, None])
                    told["output_top_logprobs"].append([[value, token, None] for token, value in top])
                if result.scores:
                    first = [[None, tokens[0], None]]
                    pairs = zip(result.scores, tokens[1:], strict=True)
                    inputs["input_token_logprobs"] = first + [[s.logprob, token, None] for s, token in pairs]
                    inputs["input_top_logprobs"] = [None] + [
                        [[value, token, None] for token, value in score.top] for score in result.scores
                    ]
                yield self.event(body, told, inputs, device, stored, sampling)
        if rid in self.engine.ended and not self.finish(told["ids"], sampling):
            meta = {"id": rid, "finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}
            yield event({"text": "", "output_ids": [], "meta_info": meta | {"completion_tokens": len(told["ids"])}})
        yield b"data: [DONE]\n\n"

    def finish(self, ids: list[int], sampling: Sampling) -> dict[str, Any] | None:
        if ids[-1:] and ids[-1] in sampling.stop_tokens and len(ids) >= sampling.min_tokens:
            return {"type": "stop", "matched": ids[-1]}
        return {"type": "length", "length": len(ids)} if len(ids) == sampling.max_tokens else None

    def event(
        self,
        body: dict[str, Any],
        told: dict[str, list[Any]],
        inputs: dict[str, Any],
        device: int,
        stored: int,
        sampling: Sampling,
    ) -> bytes:
        def new(name: str) -> list[Any]:
            return told[name][-1:] if self.incremental else told[name]

        meta: dict[str, Any] = {
            "id": body["rid"],
            "finish_reason": self.finish(told["ids"], sampling),
            "prompt_tokens": len(body["input_ids"]),
            "weight_version": "default",
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": len(told["ids"]),
            "cached_tokens": device + stored,
            "cached_tokens_details": None,
        }
        if device + stored:
            meta["cached_tokens_details"] = {
                "device": device,
                "host": 0,
                "storage": stored,
                "storage_backend": "TracehaulStorage",
            }
        if body.get("return_logprob"):
            meta |= {"input_token_logprobs": [], "output_token_logprobs_length": len(told["ids"])} | inputs
            meta["output_token_logprobs"] = new("output_token_logprobs")
            if body["top_logprobs_num"] > 0:
                meta |= {"input_top_logprobs": inputs.get("input_top_logprobs", [])}
                meta["output_top_logprobs"] = new("output_top_logprobs")
            else:
                meta.pop("input_top_logprobs", None)
        # Text may hold what ends lines of text, but not of JSON.
        return event({"text": "a\u2028b", "output_ids": new("ids"), "meta_info": meta})


class VLLMServer:
    def __init__(self, engine: StockEngine) -> None:
        self.engine = engine

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/version", self.version),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ]
        )

    async def health(self, request: Request) -> Response:
        await self.engine.frozen.wait()
        return Response(status_code=200)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": "0.32.0"})

    async def models(self, request: Request) -> Response:
        await self.engine.frozen.wait()
        card = {
            "id": MODEL,
            "object": "model",
            "created": 1,
            "owned_by": "vllm",
            "root": "/models/fake",
            "parent": None,
            "max_model_len": self.engine.engine.info.context_max,
            "permission": [],
        }
        return JSONResponse({"object": "list", "data": [card]})

    async def metrics(self, request: Request) -> Response:
        await self.engine.frozen.wait()
        engine = self.engine.engine
        used = 1 - engine.free_tokens / engine.info.kv_tokens_max
        blocks = engine.info.kv_tokens_max // PAGE
        labels, prefill, decoded = '{engine="0",model_name="fake"}', self.engine.prefill_tokens, self.engine.decoded
        return PlainTextResponse(
            "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{labels} {float(len(self.engine.running))}\n"
            f"vllm:num_requests_waiting{labels} 0.0\n"
            f"vllm:kv_cache_usage_perc{labels} {used}\n"
            f'vllm:cache_config_info{{block_size="{PAGE}",engine="0",num_gpu_blocks="{blocks}"}} 1.0\n'
            f"vllm:request_prefill_time_seconds_sum{labels} {prefill / 1000}\n"
            f"vllm:request_prefill_kv_computed_tokens_sum{labels} {float(prefill)}\n"
            f"vllm:inter_token_latency_seconds_sum{labels} {decoded / 100}\n"
            f"vllm:inter_token_latency_seconds_count{labels} {float(decoded)}\n"
        )

    def error(self, status: int, message: str, kind: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": kind, "param": None, "code": status}}

    async def completions(self, request: Request) -> Response:
        await self.engine.frozen.wait()
        body = await request.json()
        self.engine.asked.append(body)
        fail, self.engine.fail = self.engine.fail, ""
        if fail == "500":
            return JSONResponse(self.error(500, "EngineCore died", "InternalServerError"), status_code=500)
        if fail == "503":
            return JSONResponse(self.error(503, "The queue is full", "ServiceUnavailableError"), status_code=503)
        if fail == "garbage":
            return StreamingResponse(iter([b"data: {]\n\n"]), media_type="text/event-stream")
        said = ""
        if len(body["prompt"]) >= self.engine.engine.info.context_max:
            said = f"This model's maximum context length is 1024 tokens. Yours has {len(body['prompt'])}."
        elif fail == "400":
            said = "temperature must be non-negative"
        if said:
            return JSONResponse(self.error(400, said, "BadRequestError"), status_code=400)
        assert body["model"] == MODEL
        assert not (body["stream"] and body.get("prompt_logprobs")), "vLLM refuses this"
        if body["stream"]:
            return StreamingResponse(self.events(body), media_type="text/event-stream")
        return await self.whole(request, body)

    def results(self, body: dict[str, Any]) -> AsyncGenerator[tuple[Result, int, int], None]:
        outputs = body.get("structured_outputs") or {}
        kinds = {"json": "json_schema", "regex": "regex", "grammar": "grammar"}
        constraint = next((Constraint(kind, outputs[name]) for name, kind in kinds.items() if name in outputs), None)
        names = SAME | {"max_tokens": "max_tokens", "min_tokens": "min_tokens", "seed": "seed"}
        sampling = _sampling(body, names, body.get("logprobs"), constraint)
        scores_top = body.get("prompt_logprobs")
        return self.engine.generate(
            body["request_id"], body["prompt"], sampling, body.get("cache_salt", ""), scores_top
        )

    def logprobs(self, results: list[Result]) -> dict[str, Any]:
        told: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for result in results:
            assert result.logprobs is not None
            told["text_offset"].append(0)
            told["tokens"].append(f"token_id:{result.token}")
            told["token_logprobs"].append(result.logprobs.logprob)
            own = {f"token_id:{result.token}": result.logprobs.logprob}
            told["top_logprobs"].append(own | {f"token_id:{token}": value for token, value in result.logprobs.top})
        return told

    def choice(self, body: dict[str, Any], ids: list[int], new: list[Result], *, first: bool) -> dict[str, Any]:
        stopped = ids[-1] in body["stop_token_ids"] and len(ids) >= body["min_tokens"]
        reason = "stop" if stopped else "length" if len(ids) == body["max_tokens"] else None
        return {
            "index": 0,
            "text": "a\u2028b",
            "logprobs": None if body.get("logprobs") is None else self.logprobs(new),
            "finish_reason": reason,
            "stop_reason": ids[-1] if stopped else None,
            "prompt_token_ids": body["prompt"] if first else None,
            "token_ids": [result.token for result in new],
        }

    def usage(self, body: dict[str, Any], count: int, cached: int) -> dict[str, Any]:
        prompt = len(body["prompt"])
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + count, "completion_tokens": count}
        return usage | {"prompt_tokens_details": {"cached_tokens": cached}}

    async def events(self, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        head = {"id": f"cmpl-{body['request_id']}", "object": "text_completion", "created": 1, "model": MODEL}
        ids: list[int] = []
        cached = 0
        assert body["stream_options"] == {"include_usage": True}
        yield b": keep-alive\n\n"
        async with contextlib.aclosing(self.results(body)) as results:
            async for result, device, stored in results:
                assert result.token is not None
                ids.append(result.token)
                cached = device + stored
                yield event(head | {"choices": [self.choice(body, ids, [result], first=len(ids) == 1)]})
        yield event(head | {"choices": [], "usage": self.usage(body, len(ids), cached)})
        yield b"data: [DONE]\n\n"

    async def whole(self, request: Request, body: dict[str, Any]) -> Response:
        async def compute() -> tuple[list[Result], int]:
            async with contextlib.aclosing(self.results(body)) as results:
                all_of_it = [item async for item in results]
            return [result for result, _, _ in all_of_it], all_of_it[0][1] + all_of_it[0][2]

        async def left() -> None:
            while not await request.is_disconnected():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        computing, leaving = asyncio.create_task(compute()), asyncio.create_task(left())
        await asyncio.wait([computing, leaving], return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not computing.done():
            computing.cancel()
            return Response(status_code=499)
        results, cached = computing.result()
        ids = [result.token for result in results if result.token is not None]
        choice = self.choice(body, ids, results, first=True)
        if results[0].scores:
            choice["prompt_logprobs"] = [None] + [
                {
                    str(token): {"logprob": value, "rank": 1, "decoded_token": "x"}
                    for token, value in (*score.top, (own, score.logprob))
                }
                for own, score in zip(body["prompt"][1:], results[0].scores, strict=True)
            ]
        return JSONResponse(
            {
                "id": f"cmpl-{body['request_id']}",
                "object": "text_completion",
                "created": 1,
                "model": MODEL,
                "choices": [choice],
                "service_tier": None,
                "system_fingerprint": None,
                "usage": self.usage(body, len(ids), cached),
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )


class Listening:
    """An application on a port of its own, which can die like a process."""

    def __init__(self, app: Starlette, port: int = 0) -> None:
        self._app = app
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> "Listening":
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup(sockets=[self._socket])
        return self

    async def kill(self) -> None:
        """Nobody listens, and every connection is reset."""
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        self._socket.close()
        for task in list(self._server.server_state.tasks):
            task.cancel()
        await asyncio.gather(*self._server.server_state.tasks, return_exceptions=True)
