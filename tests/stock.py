"""What stock servers have inside, for those that speak as SGLang and as vLLM do: a fake engine that proves its KV."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.applications import Starlette

from engines.vllm.chains import tenant_of
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
        self.model = MODEL
        """What clients call it by."""
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
        self.ran: list[tuple[str, bytes]] = []
        """What its own memory has, by salts."""
        self.garbles = False
        """Whether it reads what the store has in another order than it was written in."""
        self.tasks: set[asyncio.Task[None]] = set()

    async def generate(
        self, rid: str, tokens: list[int], sampling: Sampling, salt: str, scores_top: int | None, *, stops: bool = True
    ) -> AsyncGenerator[tuple[Result, int, int], None]:
        """Results, each with the tokens found in its own memory and in the store. ``stops``: at a stop token."""
        engine, stop = self.engine, asyncio.Event()
        self.running[rid] = stop
        sequence = engine.open(len(tokens) + sampling.max_tokens)
        assert sequence is not None
        try:
            packed = pack_tokens(tokens)
            device = max((common_prefix(packed, other) for own, other in self.ran if own == salt), default=0)
            device = 0 if scores_top is not None else min(device, len(tokens) - 1) // PAGE * PAGE
            if device:
                await self._step(Work(sequence, tokens[:device]))
            shared = tenant_of(SimpleNamespace(cache_salt=salt))
            stored = await self._pull(sequence, packed, device, shared) if scores_top is None else 0
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
                    self.ran.append((salt, packed))
                    task = asyncio.create_task(self._put(packed, shared))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)
                assert result.token is not None, result.error
                emitted += 1
                self.decoded += 1
                if history is not None:
                    history.add(result.token)
                yield result, device, stored
                if emitted == sampling.max_tokens or (
                    stops and result.token in sampling.stop_tokens and emitted >= sampling.min_tokens
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
                if self.garbles:
                    view[0][:] = bytes(view[0])[::-1]
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


def sampling_of(
    body: dict[str, Any], names: dict[str, str], tops: int | None, constraint: Constraint | None
) -> Sampling:
    said = {ours: body[theirs] for ours, theirs in names.items() if body.get(theirs) is not None}
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
