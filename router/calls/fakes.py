"""Both neighbours of calls, small and scripted: for tests of it and of its clients."""

import asyncio
import codecs
import json
import math
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from router.adapt.story import Noted
from router.dispatch.again import began, told
from router.dispatch.flips import FlipOutcome
from router.dispatch.steps import Finished, ModelCard, Output, StepRequest, Tell
from router.fleet.members import NodeStatus
from router.policy.prices import FREE, Bill
from router.policy.retention import RetentionConfig
from router.policy.slack import Slack
from router.traces.asks import Begun
from router.traces.book import Book
from router.traces.contexts import Left
from router.traces.events import Deleted, Event, StepEnded
from router.traces.hits import Hits
from router.traces.machine import Traces
from router.traces.trace import PinWish, Trace
from tracehaul.runtime import clock
from tracehaul.wire.blocks import Pinned
from tracehaul.wire.cluster import WorkerRole
from tracehaul.wire.errors import InvalidRequest, Overloaded
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import BlockHash, NodeId, StepId
from tracehaul.wire.steps import StepUsage

IM_START, IM_END = 256, 257
_SPECIAL = {"<|im_start|>": IM_START, "<|im_end|>": IM_END}
_MERGED = {258 + i: text for i, text in enumerate(("\n\n", "th", "the", " the", "ab", "abc"))}
TOKEN_CHARACTERS_MAX = max(map(len, [*_SPECIAL, *_MERGED.values()]))
_READ = re.compile("|".join(re.escape(t) for t in [*_SPECIAL, *sorted(_MERGED.values(), key=len, reverse=True)]))
_IDS = _SPECIAL | {text: token for token, text in _MERGED.items()}


class FakeTextStream:
    """Bytes to text, in whole characters. ``special``: with special tokens."""

    def __init__(self, *, special: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = {token: text.encode() for text, token in _SPECIAL.items()} if special else {}

    def push(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self._shown.get(token) or _token_bytes(token) for token in tokens))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeText:
    """A tokenizer of bytes, a few merges, and ChatML: where a text is cut changes its tokens, as in real ones."""

    def __init__(self) -> None:
        self.vocab_size = 258 + len(_MERGED)
        self.eos_tokens: tuple[int, ...] = (IM_END,)
        self.revision = "fake"
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

    def tokens_min(self, characters: int) -> int:
        return characters // TOKEN_CHARACTERS_MAX

    def tokens_at_least(self, text: str, enough: int) -> int:
        piece = text[: enough + 2 * TOKEN_CHARACTERS_MAX]  # its last token may be a part of one
        return max(0, len(self.encode(piece)) - TOKEN_CHARACTERS_MAX)

    def special_token(self, text: str) -> int | None:
        return _SPECIAL.get(text)

    def stream(self, shown: Sequence[str] | None = ()) -> FakeTextStream:
        return FakeTextStream(special=shown is None)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        now_s: float | None = None,
    ) -> str:
        if any(message["content"] == "refuse" for message in messages):
            raise InvalidRequest("the template refuses this")
        text = f"<|im_start|>tools\n{len(tools)}<|im_end|>\n" if tools else ""
        if variables:
            text += f"<|im_start|>variables\n{json.dumps(dict(variables), sort_keys=True)}<|im_end|>\n"
        for message in messages:
            text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _token_bytes(token: int) -> bytes:
    if token < 256:
        return bytes([token])
    return _MERGED.get(token, "").encode()


Script = Sequence[Output | Finished | Exception | float]
"""What a step does, in order: tell, end, fail, or wait that many seconds."""


CROWD = 16
"""So many traces are checked at each event."""


class FakeKeeper:
    """Tells the traces, and notes what it is told; what follows is not done."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self.events: list[Event] = []
        self.told: list[tuple[object, ...]] = []

    def now_s(self) -> float:
        return clock.now_s()

    def send(self, event: Event) -> None:
        self.events.append(event)
        self._traces.handle(event, clock.now_s())
        # A check looks at each trace: at a crowd of them not at each event.
        if len(self.events) % (1 + len(self._traces) // CROWD) == 0:
            self._traces.check()

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
        self.flips: list[tuple[NodeId, str]] = []
        self.noted: list[Noted] = []
        self.why_not_flipped = ""
        self.room = 4
        """For steps of the background."""
        self.requests: list[StepRequest] = []
        self.running = 0
        self.aborted: list[str] = []
        """Steps that were closed before their end."""
        self.traces = Traces(100, 1 << 24, RetentionConfig())
        self.keeper = FakeKeeper(self.traces)
        self.book = Book(self.traces, self.keeper)
        self.cost = FREE
        """Of each step."""

    @property
    def deleted(self) -> list[str]:
        """Traces that clients deleted."""
        return [event.key[1] for event in self.keeper.events if isinstance(event, Deleted)]

    async def run(self, request: StepRequest, tell: Tell | None = None) -> AsyncGenerator[Output | Finished, None]:
        key, step, prompt = (request.salt, request.trace), request.step, request.prompt_tokens
        self.requests.append(request)
        emitted: list[int] = []
        for item in told(request):
            yield item
            if isinstance(item, Finished):
                return
            emitted += item.tokens
        self.running += 1
        self.keeper.send(began(request, clock.now_s()))
        ending, known, hits = None, request.begun.usage, request.begun.hits
        try:
            for item in _behind(self.script(request), len(emitted)):
                match item:
                    case float() | int():
                        await asyncio.sleep(item)
                    case Exception():
                        ending = "internal"
                        raise item
                    case Finished(reason, known, hits):
                        ending = reason
                        yield item
                    case Output(tokens, usage, _, logprobs):
                        emitted += tokens
                        known = usage or known
                        if tell is None or usage or logprobs or not tell(tokens):
                            yield item
        finally:
            self.running -= 1
            if ending is None:
                self.aborted.append(step)
            packed = request.prompt + pack_tokens(emitted[:-1])
            left = Left(step, BlockHash(b"fake"), 32, packed, b"", prompt, None) if emitted else None
            reason: Any = ending if ending in ("stop", "length") else None
            begun = Begun(pack_tokens(emitted), reason, known, hits) if request.ask else None
            self.keeper.send(
                StepEnded(key, step, ending or "aborted", len(emitted), None, left, 0.0, request.final, begun)
            )

    def model(self, name: str) -> ModelCard | None:
        return self.card if self.card is not None and self.card.name == name else None

    def models(self) -> list[ModelCard]:
        return [] if self.card is None else [self.card]

    @property
    def unit(self) -> str:
        return "worker seconds"

    def bill(self, step: StepId) -> Bill:
        return self.cost

    def slack(self) -> Slack:
        return Slack(self.room, math.inf)

    def nodes(self) -> list[NodeStatus]:
        return self.statuses

    async def flip(self, node: NodeId, role: WorkerRole) -> FlipOutcome:
        self.flips.append((node, role))
        return FlipOutcome(node, role, not self.why_not_flipped, self.why_not_flipped, 0.5)

    def changes(self, node: NodeId) -> Sequence[Noted]:
        return [one for one in self.noted if one.what.node == node]


def _behind(script: Script, count: int) -> Script:
    """What follows the first ``count`` tokens of a script; of these nothing is left, nor the time that they take."""
    found: list[Output | Finished | Exception | float] = []
    for item in script:
        if isinstance(item, Output) and item.tokens and count:
            count -= (cut := min(count, len(item.tokens)))
            if cut == len(item.tokens):
                continue
            item = msgspec.structs.replace(item, tokens=item.tokens[cut:])
        elif count and isinstance(item, float | int):
            continue
        found.append(item)
    return found


def say(text: str, *, reason: str = "stop", delay_s: float = 0.0) -> Callable[[StepRequest], Script]:
    """A script that answers ``text`` byte by byte."""

    def script(request: StepRequest) -> Script:
        usage = StepUsage(
            prompt_tokens=request.prompt_tokens,
            computed_from=request.prompt_tokens // 2,
            resident_tokens=3,
            pulled_bytes=7,
        )
        half = request.prompt_tokens // 2
        hits = Hits(theoretical=half + 1, delivered=half, losses={"evicted": 1})
        tokens = list(text.encode()) + ([IM_END] if reason == "stop" else [])
        items: list[Output | Finished | Exception | float] = []
        for at, token in enumerate(tokens):
            items += [delay_s] if delay_s else []
            items.append(Output([token], usage, hits) if at == 0 else Output([token]))
        items.append(Finished("stop" if reason == "stop" else "length", usage, hits))
        return items

    return script
