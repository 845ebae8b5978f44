"""How a simulated agent says its context to the router, and what the router may make of that in tokens.

An oracle of its own: it knows of the router's memory only what the API promises, that what was answered in a trace
comes back in the tokens that were generated, for as long as that router lives; others may know it, too. Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sim.text import END, VOCAB, render, shown, spelled
from sim.traces import Dialect
from tracehaul.engine.fake import TrueState


class Voice(Protocol):
    """One trace's context, in one dialect."""

    @property
    def path(self) -> str:
        """Where its calls go."""
        ...

    @property
    def state(self) -> TrueState:
        """The context after the last step, as far as the client knows it."""
        ...

    def say(self, tokens: Sequence[int]) -> None:
        """What comes before the next call."""
        ...

    def body(self) -> Mapping[str, Any]:
        """The call's prompt."""
        ...

    def prompts(self, router: str) -> list[TrueState]:
        """What it may be in tokens, to that life of the router (empty: to any); likeliest first."""
        ...

    def heard(
        self, router: str, prompt: TrueState, received: Sequence[int], output: Sequence[int], *, kept: bool
    ) -> None:
        """The call ended, or its client left.

        Args:
            router: the life that served it.
            prompt: one of :meth:`prompts`.
            received: of its ``output``.
            output: all that a finished step has.
            kept: all of it was received, and the router is to remember it.
        """
        ...

    def copy(self) -> "Voice":
        """For a trace that forks off."""
        ...


def voice_of(dialect: Dialect) -> Voice:
    """Of a new trace."""
    return Ids(TrueState(VOCAB)) if dialect == "completions" else Chat()


class Ids:
    """Completions of token ids: the router is told each token."""

    path = "/v1/completions"

    def __init__(self, state: TrueState) -> None:
        self.state = state

    def say(self, tokens: Sequence[int]) -> None:
        self.state.extend(tokens)

    def body(self) -> Mapping[str, Any]:
        return {"prompt": self.state.tokens}

    def prompts(self, router: str) -> list[TrueState]:
        return [self.state]

    def heard(
        self, router: str, prompt: TrueState, received: Sequence[int], output: Sequence[int], *, kept: bool
    ) -> None:
        self.state.extend(received)

    def copy(self) -> "Ids":
        return Ids(self.state.copy())


class _Known(NamedTuple):
    """What a life of the router remembers of a trace: a text, and the context that it stands for."""

    router: str
    text: str
    state: TrueState


class Chat:
    """Chat completions: the router is told texts, and has to know the tokens that they were generated in."""

    path = "/v1/chat/completions"

    def __init__(self) -> None:
        self.state = TrueState(VOCAB)
        self._messages: list[tuple[str, str]] = []
        self._answered: list[_Known] = []
        """After each step that was answered to its end."""
        self._perhaps: list[_Known] = []
        """After steps that the client left, where what it has of their text is all of it."""
        self._forked = False
        """No step of its own was answered yet: what the router remembers is another trace's."""

    def say(self, tokens: Sequence[int]) -> None:
        self._messages.append(("user" if self._messages else "system", shown(tokens)))

    def body(self) -> Mapping[str, Any]:
        return {"messages": [{"role": role, "content": content} for role, content in self._messages]}

    def prompts(self, router: str) -> list[TrueState]:
        text = render(self._messages)
        answered = [*reversed(self._answered)]
        nothing = _Known(router, "", TrueState(VOCAB))
        # The other trace may have ended, and be forgotten; our own last step is remembered for certain by who served
        # it, and by the others as far as it was written down.
        certain = answered and answered[0].router == router and not self._forked
        bases = answered[:1] if certain else [*answered, nothing]
        bases += self._perhaps
        prompts: list[TrueState] = []
        for base in bases:
            assert text.startswith(base.text)
            state = base.state.copy()
            state.extend(spelled(text[len(base.text) :]))
            if all(state.tokens != other.tokens for other in prompts):
                prompts.append(state)
        return prompts

    def heard(
        self, router: str, prompt: TrueState, received: Sequence[int], output: Sequence[int], *, kept: bool
    ) -> None:
        said = shown(received)
        if kept or shown(output) == said:
            state = prompt.copy()
            state.extend(quoted(output))
            (self._answered if kept else self._perhaps).append(_Known(router, render(self._messages) + said, state))
            self._forked = self._forked and not kept
        self._messages.append(("assistant", said))
        self.state = prompt.copy()
        self.state.extend(received)

    def copy(self) -> "Chat":
        other = Chat()
        other.state = self.state.copy()
        other._messages = list(self._messages)
        other._answered, other._perhaps = list(self._answered), list(self._perhaps)
        other._forked = True
        return other


def quoted(output: Sequence[int]) -> Sequence[int]:
    """What the next prompt has of a whole answer: the token that ended it is the template's."""
    return output[:-1] if output and output[-1] == END else output
