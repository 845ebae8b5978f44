"""A served fake for fuzzing: ``python tests/fuzz/server.py`` prints its port, and serves until its standard input ends.

What it answers goes by the prompt: text, calls and thoughts, whole and cut. A process of its own, as schemathesis needs
other packages than the server does.
"""

import asyncio
import sys
from zlib import crc32

import msgspec
import uvloop

from router.calls.fakes import FakeDispatcher, FakeKeeper, FakeText, Script, say
from router.dispatch.steps import ModelCard, Output, StepRequest
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.server import serve
from router.traces.book import Book
from router.traces.trace import PinWish, Trace
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.wire.blocks import Pinned
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import TokenLogprobs

MODEL = "fake"
ANSWERS = (
    "",
    "héllo 🙂",
    '{"city": "Paris"}',
    "<think>first</think>then",
    "<think>never ended",
    '<tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}\n</tool_call>',
    'so <tool_call>\n{"name": "f", "arguments": {"a": "x\ny"}}\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>',
    '<tool_call>\n{"name": "f", "arguments": {"a": ',
    "\ufffd\x00\u2028<|im_start|>",
)


def script(request: StepRequest) -> Script:
    """One of them, ended by the model or by length, with the logprobs that are asked for."""
    at, cut = divmod(crc32(request.prompt), 2)
    said = list(say(ANSWERS[at % len(ANSWERS)], reason="length" if cut else "stop")(request))
    if (top := request.sampling.logprobs) is not None:
        for place, item in enumerate(said):
            if isinstance(item, Output):
                said[place] = msgspec.structs.replace(item, logprobs=[scored(token, top) for token in item.tokens])
    if (top := request.prompt_logprobs) is not None:
        scores = [scored(token, top) for token in unpack_tokens(request.prompt)[1:]]
        said.insert(0, Output([], prompt_logprobs=scores))
    return said


def scored(token: int, top: int) -> TokenLogprobs:
    """Made up, for any token."""
    return TokenLogprobs(-token / 64, tuple((at, -at / 8) for at in range(top)))


class Keeper(FakeKeeper):
    """Has room for all pins."""

    async def pin(self, trace: Trace, wish: PinWish) -> Pinned:
        return Pinned(5, 4, 60.0)


async def main() -> None:
    """Serves on a free port."""
    offload = ThreadOffload("tokenize")
    dispatcher = FakeDispatcher(script)
    dispatcher.card = ModelCard(MODEL, 4096)
    dispatcher.book = Book(dispatcher.traces, Keeper(dispatcher.traces))
    app = create_app(dispatcher, {MODEL: FakeText()}, lambda: b"", ApiConfig(), offload)
    server = await serve(app, "127.0.0.1", 0, grace_s=1)
    print(server.port, flush=True)  # noqa: T201 - who started this waits for it
    await asyncio.to_thread(sys.stdin.read)
    await server.close()
    offload.close()


if __name__ == "__main__":
    uvloop.run(main())
