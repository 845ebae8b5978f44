"""How messages are told, whole or as events. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from router.calls.events import Begun, CallEvent, Choice, Ended, Piece, Usage
from router.dialects.blocks import Block, Blocks, Close, More, Open, Turn, blocks_of
from router.dialects.messages.answers import Answer, content_block, diagnostics, message_usage, signature, stop_reason

_encode = msgspec.json.Encoder().encode
_STARTS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
}
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}
"""Their types, and the fields that hold them."""
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class MessageTeller:
    """Tells one message: its id, and its model."""

    def __init__(self, name: str, model: str) -> None:
        self._name = name
        self._model = model
        self._blocks = Blocks()
        self._ended = Ended(0, "stop", False)
        self._frame, self._framed = b"", -1
        """What deltas of a block are up to their text, and of which block: encoded once."""

    def events(self, events: Iterable[CallEvent]) -> bytes:
        told: list[bytes] = []
        for happened in events:
            match happened:
                case Piece(said=said):
                    self._tell(self._blocks.feed(said), told)
                case Begun(usage=usage):
                    assert usage is not None
                    begun = Answer(self._name, self._model, (), None, None, message_usage(usage), diagnostics(usage))
                    told.append(_event("message_start", message=begun))
                    told.append(PING)
                case Ended():
                    self._ended = happened
                    self._tell(self._blocks.finish(), told)
        return b"".join(told)

    def end(self, usage: Usage) -> bytes:
        ended = self._ended
        delta = {"stop_reason": stop_reason(ended.reason, ended.called, ended.stop), "stop_sequence": ended.stop}
        return _event("message_delta", delta=delta, usage=message_usage(usage)) + _event("message_stop")

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        choice = choices[0]
        content = [content_block(block) for block in blocks_of(choice.said)]
        reason = stop_reason(choice.reason, choice.called, choice.stop)
        told = message_usage(usage)
        return _encode(Answer(self._name, self._model, content, reason, choice.stop, told, diagnostics(usage)))

    def _tell(self, turns: Sequence[Turn], told: list[bytes]) -> None:
        for turn in turns:
            match turn:
                case More(block, text):
                    told.append(b"%b:%b}}\n\n" % (self._head(block), _encode(text)))
                case Open(block):
                    start = _STARTS.get(block.kind)
                    if start is None:
                        start = {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
                    told.append(_event("content_block_start", index=block.at, content_block=start))
                case Close(block):
                    if block.kind == "reasoning":
                        delta = {"type": "signature_delta", "signature": signature(block.text)}
                        told.append(_event("content_block_delta", index=block.at, delta=delta))
                    told.append(_event("content_block_stop", index=block.at))

    def _head(self, block: Block) -> bytes:
        if self._framed != block.at:
            kind, field = _DELTAS[block.kind]
            whole = _event("content_block_delta", index=block.at, delta={"type": kind, field: ""})
            self._frame, self._framed = whole[: whole.rindex(b':""}}')], block.at
        return self._frame


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))
