"""Both neighbours of the HTTP surface, small and scripted: for tests of it and of its clients."""

import asyncio
import codecs
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from router.dispatch.steps import Finished, ModelCard, Output, StepRequest
from router.fleet.members import NodeStatus
from router.traces.book import Book
from router.traces.decisions import Decisions
from router.traces.hits import Hits
from router.traces.registry import PinWish, Trace, Traces
from tracehaul.wire.blocks import Pinned
from tracehaul.wire.errors import InvalidRequest, Overloaded
from tracehaul.wire.steps import StepUsage

IM_START, IM_END = 256, 257
_SPECIAL = {"<|im_start|>": IM_START, "<|im_end|>": IM_END}
_MERGED = {258 + i: text for i, text in enumerate(("\n\n", "th", "the", " the", "ab", "abc"))}
_READ = re.compile("|".join(re.escape(t) for t in [*_SPECIAL, *sorted(_MERGED.values(), key=len, reverse=True)]))
_IDS = _SPECIAL | {text: token for token, text in _MERGED.items()}


class FakeTextStream:
    """Bytes to text, in whole characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(_token_bytes(token) for token in tokens))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeText:
    """A tokenizer of bytes, a few merges, and ChatML: where a text is cut changes its tokens, as in real ones."""

    def __init__(self) -> None:
        self.vocab_size = 258 + len(_MERGED)
        self.eos_tokens: tuple[int, ...] = (IM_END,)
        self.chat_template: str | None = None
        self.encoded: list[str] = []
        """Every text that was tokenized."""

    def token_text(self, token: int) -> str:
        names = {value: key for key, value in _SPECIAL.items()}
        return names.get(token) or _token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return self.token_text(token).encode() if token in (IM_START, IM_END) else _token_bytes(token)

    def encode(self, text: str, special: bool = False) -> list[int]:
        self.encoded.append(text)
        ids: list[int] = []
        at = 0
        for match in _READ.finditer(text):
            ids += text[at : match.start()].encode()
            ids.append(_IDS[match.group()])
            at = match.end()
        return ids + list(text[at:].encode())

    def special_token(self, text: str) -> int | None:
        return _SPECIAL.get(text)

    def stream(self, shown: Sequence[str] = ()) -> FakeTextStream:
        return FakeTextStream()

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        if any(message["content"] == "refuse" for message in messages):
            raise InvalidRequest("the template refuses this")
        text = f"<|im_start|>tools\n{len(tools)}<|im_end|>\n" if tools else ""
        for message in messages:
            text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _token_bytes(token: int) -> bytes:
    if token < 256:
        return bytes([token])
    return _MERGED.get(token, "").encode()


Script = Sequence[Output | Finished | Exception | float]
"""What a step does, in order: tell, end, fail, or wait that many seconds."""


class FakeKeeper:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def suspend(self, trace: Trace, expected_s: float, deadline_s: float | None, tool: str | None) -> None:
        self.told.append(("suspend", trace.trace, expected_s, deadline_s, tool))

    def resume(self, trace: Trace) -> None:
        self.told.append(("resume", trace.trace))

    def called(self, trace: Trace, tools: tuple[str, ...]) -> None:
        self.told.append(("called", trace.trace, tools))

    async def pin(self, trace: Trace, wish: PinWish) -> Pinned:
        self.told.append(("pin", trace.trace, wish.kind, wish.priority, wish.replicas))
        if wish.kind == "hard":
            raise Overloaded("hard pins cover too many blocks")
        return Pinned(5, 4, 60.0)

    async def unpin(self, trace: Trace) -> None:
        self.told.append(("unpin", trace.trace))


class FakeDispatcher:
    """Plays a script per step, and keeps what it was asked and how each step ended."""

    def __init__(self, script: Callable[[StepRequest], Script], context_max: int = 4096) -> None:
        self.script = script
        self.card: ModelCard | None = ModelCard("org/fake", context_max)
        self.statuses: list[NodeStatus] = []
        self.requests: list[StepRequest] = []
        self.running = 0
        self.aborted: list[str] = []
        """Steps that were closed before their end."""
        self.traces = Traces(traces_max=100, contexts_bytes_max=1 << 20)
        self.decisions = Decisions(decisions_max=1000)
        self.deleted: list[str] = []
        self.keeper = FakeKeeper()
        self.book = Book(self.traces, self.decisions, self.keeper, self._delete)

    async def run(self, request: StepRequest) -> AsyncGenerator[Output | Finished, None]:
        self.requests.append(request)
        self.running += 1
        ended = False
        try:
            for item in self.script(request):
                match item:
                    case float() | int():
                        await asyncio.sleep(item)
                    case Exception():
                        ended = True
                        raise item
                    case Finished():
                        ended = True
                        yield item
                    case Output():
                        yield item
        finally:
            self.running -= 1
            if not ended:
                self.aborted.append(request.step)

    def _delete(self, trace: Trace) -> None:
        self.traces.delete(trace.key)
        self.deleted.append(trace.trace)

    def model(self) -> ModelCard | None:
        return self.card

    def nodes(self) -> list[NodeStatus]:
        return self.statuses


def say(text: str, *, reason: str = "stop", delay_s: float = 0.0) -> Callable[[StepRequest], Script]:
    """A script that answers ``text`` byte by byte."""

    def script(request: StepRequest) -> Script:
        usage = StepUsage(
            prompt_tokens=len(request.prompt), computed_from=len(request.prompt) // 2, resident_tokens=3, pulled_bytes=7
        )
        half = len(request.prompt) // 2
        hits = Hits(theoretical=half + 1, delivered=half, losses={"evicted": 1})
        tokens = list(text.encode()) + ([IM_END] if reason == "stop" else [])
        items: list[Output | Finished | Exception | float] = []
        for at, token in enumerate(tokens):
            items += [delay_s] if delay_s else []
            items.append(Output([token], usage, hits) if at == 0 else Output([token]))
        items.append(Finished("stop" if reason == "stop" else "length", usage, hits))
        return items

    return script
