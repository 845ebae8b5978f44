"""SGLang's HTTP as of 0.5.23, over a fake engine.

What it answers has the fields that a server of 0.5.23 on a CPU answered with, value by value where the adapter looks,
but for ``server_info``'s other five hundred. What was not provoked there is as the sources make it (``sglang/srt``):
aborts in a queue (``managers/tokenizer_manager.py``) and errors with a status (``entrypoints/http_server.py``).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.stock import PAGE, SAME, StockEngine, event, sampling_of
from tracehaul.engine.base import Result
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import Constraint, Sampling


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
                Route("/flush_cache", self.flush, methods=["GET", "POST"]),
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
                "served_model_name": self.engine.model,
                "page_size": PAGE,
                "max_running_requests": None,
                "enable_priority_scheduling": False,
                "launch_command": "",
                "status": "ready",
                "max_total_num_tokens": info.kv_tokens_max,
                "max_req_input_len": info.context_max,
                "kv_events": None,
                "startup_time": {"load_weight": 1.0, "scheduler_e2e": 25.3},
                "hicache_object_layout": None,
                "internal_states": [{"page_size": PAGE}],
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
            "max_running_requests": 2048,
            "token_usage": 0.0,
            "gen_throughput": 0.0,
            "cache_hit_rate": 0.0,
            "utilization": 0.0,
            "total_prefill_uncached_tokens": self.engine.prefill_tokens,
            "total_prefill_busy_us": self.engine.prefill_tokens * 1000,
            "decode_moments": [6.0, 6.0, 1456610.0, 6.0, 1456610.0, 6.0],
        }
        answer = {
            "timestamp": "2026-01-01T00:00:00+00:00",
            "version": "0.5.23",
            "accelerator": None,
            "num_accelerators": 1,
            "loads": [load],
        }
        return JSONResponse(answer)

    async def flush(self, request: Request) -> Response:
        if self.engine.running:
            return PlainTextResponse("Flush cache failed.\n", status_code=400)
        self.engine.ran.clear()
        return PlainTextResponse("Cache flushed.\n")

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
        sampling = sampling_of(params, names, tops, constraint)
        stops = params["ignore_eos"] is False  # else those of the request are ignored with the model's own
        told: dict[str, list[Any]] = {"ids": [], "output_token_logprobs": [], "output_top_logprobs": []}
        inputs: dict[str, Any] = {}
        computed: asyncio.Queue[tuple[Result, int, int] | None] = asyncio.Queue()

        async def compute() -> None:
            """Goes on when the client has left: that is looked at every four seconds there."""
            salt = body.get("cache_salt", "")
            results = self.engine.generate(rid, tokens, sampling, salt, scores_top, stops=stops)
            async with contextlib.aclosing(results):
                async for item in results:
                    computed.put_nowait(item)
            computed.put_nowait(None)

        try:
            if constraint is not None:
                await self.engine.engine.guide(constraint, [])
        except InvalidRequest as error:
            # A token that nobody sampled comes with it.
            finish = {"type": "abort", "message": f"Failed to compile grammar: {error}", "status_code": 400}
            meta = {"id": rid, "finish_reason": finish | {"err_type": "BadRequestError"}, "prompt_tokens": 1}
            meta |= {"completion_tokens": 1, "cached_tokens": 0, "cached_tokens_details": None}
            yield event({"text": "-", "output_ids": [29], "meta_info": meta}) + b"data: [DONE]\n\n"
            return
        task = asyncio.create_task(compute())
        self.engine.tasks.add(task)
        task.add_done_callback(self.engine.tasks.discard)
        while (item := await computed.get()) is not None:
            result, device, stored = item
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
        if rid in self.engine.ended and not self.finish(told["ids"], sampling, stops):
            meta = {"id": rid, "finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}
            yield event({"text": "", "output_ids": [], "meta_info": meta | {"completion_tokens": len(told["ids"])}})
        yield b"data: [DONE]\n\n"

    def finish(self, ids: list[int], sampling: Sampling, stops: bool) -> dict[str, Any] | None:
        if stops and ids[-1:] and ids[-1] in sampling.stop_tokens and len(ids) >= sampling.min_tokens:
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
            "finish_reason": self.finish(told["ids"], sampling, body["sampling_params"]["ignore_eos"] is False),
            "prompt_tokens": len(body["input_ids"]),
            "weight_version": "default",
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": len(told["ids"]),
            "cached_tokens": device + stored,
            "cached_tokens_details": None,
            "dp_rank": None,
        }
        if len(told["ids"]) == 1:
            meta["response_sent_to_client_ts"] = 1795986070.2
        if meta["finish_reason"]:
            meta |= {"weight_versions": [{"version": "default", "start": 0, "end": len(told["ids"])}]}
            meta["e2e_latency"] = 1.36
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
