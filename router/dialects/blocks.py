"""An answer as blocks that follow each other: reasoning, text, calls. Pure."""

from typing import Literal

import msgspec

from router.calls.events import Said

Kind = Literal["reasoning", "text", "call"]


class Block(msgspec.Struct, frozen=True, gc=False):
    """One block; of a call the arguments are its text."""

    kind: Kind
    at: int
    """Its place among the answer's."""
    text: str = ""
    id: str = ""
    """Of a call, as its name."""
    name: str = ""


class Open(msgspec.Struct, frozen=True, gc=False):
    """A block begins, still empty."""

    block: Block


class More(msgspec.Struct, frozen=True, gc=False):
    """The open block goes on."""

    block: Block
    """As it began."""
    text: str


class Close(msgspec.Struct, frozen=True, gc=False):
    """The open block ends."""

    block: Block
    """All of it."""


Turn = Open | More | Close


class Blocks:
    """One answer's blocks as it grows: one is open at a time."""

    def __init__(self) -> None:
        self.closed: list[Block] = []
        self._open: Block | None = None
        self._call = -1
        """Number of the open call."""
        self._texts: list[str] = []

    def feed(self, said: Said) -> list[Turn]:
        """What a piece of the answer adds."""
        turns: list[Turn] = []
        if said.reasoning:
            self._add("reasoning", said.reasoning, turns)
        if said.content:
            self._add("text", said.content, turns)
        for call in said.calls:
            if self._open is None or self._open.kind != "call" or self._call != call.index:
                self._begin(Block("call", self._next(), id=call.id or "", name=call.name or ""), turns)
                self._call = call.index
            self._more(call.arguments, turns)
        return turns

    def finish(self) -> list[Turn]:
        """The answer ended."""
        turns: list[Turn] = []
        self._close(turns)
        return turns

    def _next(self) -> int:
        return len(self.closed) + (self._open is not None)

    def _add(self, kind: Kind, text: str, turns: list[Turn]) -> None:
        if self._open is None or self._open.kind != kind:
            self._begin(Block(kind, self._next()), turns)
        self._more(text, turns)

    def _begin(self, block: Block, turns: list[Turn]) -> None:
        self._close(turns)
        self._open = block
        turns.append(Open(block))

    def _more(self, text: str, turns: list[Turn]) -> None:
        assert self._open is not None
        if text:
            self._texts.append(text)
            turns.append(More(self._open, text))

    def _close(self, turns: list[Turn]) -> None:
        if self._open is None:
            return
        whole = msgspec.structs.replace(self._open, text="".join(self._texts))
        self._open = None
        self._texts.clear()
        self.closed.append(whole)
        turns.append(Close(whole))


def blocks_of(said: Said) -> list[Block]:
    """Of a whole answer."""
    blocks = Blocks()
    blocks.feed(said)
    blocks.finish()
    return blocks.closed
