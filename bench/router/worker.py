"""A fake decode worker for the router's bench, as a process: joins the router, computes nothing, and answers at once or
at a pace.

Told by JSON lines: ``said`` (how many tokens it has), ``full`` (whether it says that steps wait there for memory),
``pace`` (tokens a second from now on; 0: at once), ``go`` (paced steps, which wait after their first token, go on),
``times`` (when each paced token was due and was sent, by trace, in seconds of ``perf_s``).
"""

import asyncio
import contextlib
import os
import sys
from array import array
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import uvloop

from bench.common.lines import listen, say
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.member import new_generation
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import BlockHash, NodeId, TraceId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import DecodeStep, StepDone, StepUsage, Tokens

PHASES = 10
"""Paced streams take turns: this many iterations follow each other within one token's time."""
TOKEN_BYTES = 4


class Told(msgspec.Struct):
    """What the process is started with."""

    router: str
    model: str
    root: str
    """In hex."""
    block_tokens: int
    context_max: int
    token: int
    """The only one that it says."""


class FakeWorker:
    """The service. All of a prompt counts as cached."""

    def __init__(self, token: int) -> None:
        self._token = token
        self._next = Tokens(pack_tokens([token]))
        self._per_s = 0.0
        self._phases = [asyncio.Event() for _ in range(PHASES)]
        self._began_s = 0.0
        self._ticking: asyncio.Task[None] | None = None
        self._sent_s: dict[TraceId, tuple[int, array[float]]] = {}
        """Of each paced step its phase, and when its tokens were sent."""
        self._said = 0
        self._full = False

    def load(self) -> NodeLoad:
        """What it says of itself."""
        return NodeLoad(token_s=1e-4, pair_s=1e-9, decode_s=0.01, free_tokens=1 << 24, waiting=int(self._full))

    async def do(self, command: dict[str, Any]) -> Any:
        """Carry out one command."""
        match command["do"]:
            case "pace":
                self._per_s = command["per_s"]
                self._sent_s = {}
            case "pin":
                os.sched_setaffinity(0, command["cores"])
            case "full":
                self._full = command["full"]
            case "said":
                return self._said
            case "go":
                if self._ticking is not None:
                    self._ticking.cancel()
                self._ticking = asyncio.create_task(self._tick())
            case "times":
                return {
                    trace: [self._due_s(phase, len(sent)), list(sent)] for trace, (phase, sent) in self._sent_s.items()
                }
            case other:
                raise AssertionError(other)
        return "done"

    async def call(self, request: Request, context: CallContext) -> Reply:
        return Ok()  # the router asks for what it may do without

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        assert isinstance(request, DecodeStep)
        prompt_tokens, before = len(request.prompt) // TOKEN_BYTES, len(request.emitted) // TOKEN_BYTES
        count = request.sampling.max_tokens
        usage = StepUsage(prompt_tokens, count, prompt_tokens - 1, computed_from=prompt_tokens - 1)
        self._said += 1
        yield Tokens(self._next.ids, usage)
        if self._per_s == 0 and count > before + 1:
            self._said += count - before - 1
            yield Tokens(pack_tokens([self._token] * (count - before - 1)))
        elif self._per_s:
            phase = len(self._sent_s) % PHASES
            sent_s = array("d")
            self._sent_s[request.trace] = phase, sent_s
            ready = self._phases[phase]
            for _ in range(count - before - 1):
                await ready.wait()
                self._said += 1
                sent_s.append(clock.perf_s())
                yield self._next
        yield StepDone("length", usage, prompt_tokens + count - 1)

    def disconnected(self, peer: str) -> None:
        """Nothing is held for a connection."""

    async def _tick(self) -> None:
        """Iterations, each of one phase's streams; those that come late follow without a pause."""
        self._began_s = clock.perf_s()
        turn = 0
        while True:
            await asyncio.sleep(max(0.0, self._began_s + turn / (self._per_s * PHASES) - clock.perf_s()))
            self._phases[turn % PHASES].set()
            self._phases[turn % PHASES].clear()
            turn += 1

    def _due_s(self, phase: int, count: int) -> list[float]:
        return [self._began_s + (k * PHASES + phase) / (self._per_s * PHASES) for k in range(count)]


async def main(told: Told) -> None:
    """Be the worker."""
    worker = FakeWorker(told.token)
    network = TcpNetwork()
    server = await network.listen("127.0.0.1:0", worker)
    info = NodeInfo(
        NodeId("fake-0"),
        new_generation(),
        "decode",
        server.address,
        model=told.model,
        root=BlockHash(bytes.fromhex(told.root)),
        block_tokens=told.block_tokens,
        context_max=told.context_max,
    )
    membership = Membership(Peers(network), [told.router], info, worker.load, lambda members: None)
    joining = asyncio.create_task(membership.run())
    await membership.joined.wait()
    say(server.address)
    await listen(worker.do)
    joining.cancel()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        uvloop.run(main(msgspec.json.decode(sys.argv[1], type=Told)))
