"""How responses are told, whole or as events. Pure."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from router.calls import call
from router.calls.errors import CallFailed
from router.calls.events import Begun, CallEvent, Choice, Ended, Piece, Usage
from router.calls.slips import is_object
from router.dialects.blocks import Block, Blocks, Close, More, Open, Turn, blocks_of
from router.dialects.responses.answers import (
    CustomCallItem,
    Failure,
    FunctionCallItem,
    Incomplete,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    Status,
    SummaryText,
    cache_diagnostics,
    response_usage,
)
from router.dialects.responses.items import messages_of, sealed
from router.dialects.responses.requests import Item
from tracehaul.wire.steps import FinishReason

_encode = msgspec.json.Encoder().encode


class Shape(msgspec.Struct, frozen=True):
    """How a request wants its output told."""

    custom: frozenset[str] = frozenset()
    """Tools that are called with a text."""
    summarised: bool = False
    """Reasoning is told as a summary."""
    sealed: bool = False
    """Reasoning items have ``encrypted_content``."""


class ResponseTeller:
    """Tells one response.

    Args:
        begun: the response before its output.
        shape: how its output is told.
        asked: what the request's ``input`` is made of.
        instructions: what precedes all else, this time.
    """

    def __init__(
        self, begun: Response, shape: Shape, asked: tuple[Item, ...], instructions: tuple[call.Message, ...]
    ) -> None:
        self.begun = begun
        self.asked = asked
        self.body = b""
        """The request, of what runs in the background."""
        self.keep: Callable[[Response], None] | None = None
        """Called with the whole response just before it is told."""
        self._instructions = instructions
        self._shape = shape
        self._blocks = Blocks()
        self._number = 0
        self._reason: FinishReason = "stop"
        self._called = True
        """No call was cut, as far as is known."""
        self._frame, self._framed = b"", -1
        """What deltas of a block begin with, and of which block: encoded once."""

    def continued(self, asked: call.Call, before: Sequence[Item], nbytes: int) -> call.Call:
        """The call with what was said before: items, and their size in bytes.

        Raises:
            CallFailed: an item cannot be honoured.
        """
        conversation = asked.prompts[0]
        assert isinstance(conversation, call.Conversation)
        messages = (*self._instructions, *messages_of(before), *messages_of(self.asked))
        prompt = msgspec.structs.replace(conversation, messages=messages)
        return msgspec.structs.replace(asked, prompts=(prompt,), nbytes=asked.nbytes + nbytes)

    def events(self, events: Iterable[CallEvent]) -> bytes:
        told: list[bytes] = []
        for happened in events:
            match happened:
                case Piece(said=said):
                    self._tell(self._blocks.feed(said), told)
                case Begun():
                    started = msgspec.structs.replace(self.begun, status="in_progress")
                    told.append(self._event("response.created", response=started))
                    told.append(self._event("response.in_progress", response=started))
                case Ended(reason=reason, called=called):
                    self._reason, self._called = reason, called
                    self._tell(self._blocks.finish(), told)
        return b"".join(told)

    def end(self, usage: Usage) -> bytes:
        response = self._ended(self._blocks.closed, self._reason, usage)
        return self._event(f"response.{response.status}", response=response)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        choice = choices[0]
        self._called = choice.called
        return _encode(self._ended(blocks_of(choice.said), choice.reason, usage))

    def broken(self, failure: CallFailed) -> bytes:
        """The end of a stream that fails after it began."""
        return self._event("response.failed", response=self.failed(failure))

    def failed(self, failure: CallFailed) -> Response:
        """The response that failed."""
        # Clients know a list of codes, of which the others' doing has one.
        code = failure.code if failure.cause == "invalid" else None
        error = Failure(code or "server_error", str(failure))
        output = [self._item(block, block.text, "completed") for block in self._blocks.closed]
        return msgspec.structs.replace(self.begun, status="failed", error=error, output=output)

    def cancelled(self) -> bytes:
        """The end of a stream whose response was cancelled. OpenAI's events have none of that name."""
        output = [self._item(block, block.text, "completed") for block in self._blocks.closed]
        response = msgspec.structs.replace(self.begun, status="cancelled", output=output)
        return self._event("response.failed", response=response)

    def _ended(self, blocks: Sequence[Block], reason: FinishReason, usage: Usage) -> Response:
        cut = reason == "length"
        statuses: list[ItemStatus] = ["completed"] * len(blocks)
        if statuses:
            statuses[-1] = "incomplete" if cut else self._status(blocks[-1])
        status: Status = "incomplete" if cut else "completed"
        response = msgspec.structs.replace(
            self.begun,
            status=status,
            incomplete_details=Incomplete() if cut else None,
            output=[self._item(block, block.text, told) for block, told in zip(blocks, statuses, strict=True)],
            usage=response_usage(usage),
            prompt_cache_diagnostics=cache_diagnostics(usage),
        )
        if self.keep is not None:
            self.keep(response)
        return response

    def _tell(self, turns: Sequence[Turn], told: list[bytes]) -> None:
        for turn in turns:
            match turn:
                case More(block, text):
                    told.append(self._delta(block, text))
                case Open(block):
                    told.append(self._output("added", block, self._item(block, None, "in_progress")))
                    told.extend(self._part("added", block))
                case Close(block):
                    told.append(self._done(block))
                    told.extend(self._part("done", block))
                    told.append(self._output("done", block, self._item(block, block.text, self._status(block))))

    def _output(self, what: str, block: Block, item: OutputItem) -> bytes:
        return self._event(f"response.output_item.{what}", output_index=block.at, item=item)

    def _part(self, what: str, block: Block) -> list[bytes]:
        """Of a block that has parts."""
        match block.kind:
            case "call":
                return []
            case "reasoning" if self._shape.summarised:
                name, part = "response.reasoning_summary_part", SummaryText(block.text)
            case "reasoning":
                name, part = "response.content_part", ReasoningText(block.text)
            case "text":
                name, part = "response.content_part", OutputText(block.text)
        return [self._event(f"{name}.{what}", **self._place(block), part=part)]

    def _delta(self, block: Block, text: str) -> bytes:
        if self._framed != block.at:
            more = {"logprobs": ()} if block.kind == "text" else {}
            kind = f"{self._name(block)}.delta"
            fields = _encode({"type": kind, **self._place(block), **more})
            self._frame, self._framed = b"event: %b\ndata: %b" % (kind.encode(), fields[:-1]), block.at
        self._number += 1
        return b'%b,"sequence_number":%d,"delta":%b}\n\n' % (self._frame, self._number - 1, _encode(text))

    def _done(self, block: Block) -> bytes:
        more: dict[str, Any] = {"text": block.text}
        if block.kind == "text":
            more["logprobs"] = ()
        elif block.kind == "call":
            more = {"input": block.text} if self._custom(block) else {"arguments": block.text, "name": block.name}
        return self._event(f"{self._name(block)}.done", **self._place(block), **more)

    def _name(self, block: Block) -> str:
        match block.kind:
            case "text":
                return "response.output_text"
            case "reasoning":
                return "response.reasoning_summary_text" if self._shape.summarised else "response.reasoning_text"
            case "call":
                custom = self._custom(block)
                return "response.custom_tool_call_input" if custom else "response.function_call_arguments"

    def _place(self, block: Block) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._id(block), "output_index": block.at}
        if block.kind != "call":
            summary = block.kind == "reasoning" and self._shape.summarised
            place["summary_index" if summary else "content_index"] = 0
        return place

    def _item(self, block: Block, text: str | None, status: ItemStatus) -> OutputItem:
        """With that text; None: it has no part yet."""
        name = self._id(block)
        match block.kind:
            case "text":
                return MessageItem(name, () if text is None else (OutputText(text),), status)
            case "call" if self._custom(block):
                return CustomCallItem(name, block.id, block.name, text or "", status)
            case "call":
                # What was cut, by whatever, is not to be run.
                cut = status == "completed" and not is_object(text or "")
                return FunctionCallItem(name, block.id, block.name, text or "", "incomplete" if cut else status)
            case "reasoning":
                hidden = None if text is None or not self._shape.sealed else sealed(text)
                if text is None:
                    return ReasoningItem(name, (), (), status)
                if self._shape.summarised:
                    return ReasoningItem(name, (SummaryText(text),), (), status, hidden)
                return ReasoningItem(name, (), (ReasoningText(text),), status, hidden)

    def _status(self, block: Block) -> ItemStatus:
        """Of the last one: nobody sees by a text whether it is whole."""
        return "incomplete" if block.kind == "call" and self._custom(block) and not self._called else "completed"

    def _custom(self, block: Block) -> bool:
        return block.name in self._shape.custom

    def _id(self, block: Block) -> str:
        kinds = {"text": "msg", "reasoning": "rs", "call": "ctc" if self._custom(block) else "fc"}
        return f"{kinds[block.kind]}_{self.begun.id.removeprefix('resp_')}{block.at:03d}"

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = _encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)
