"""One accepted call while it runs: from steps' output to what happens in it."""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import msgspec

from router.calls.answers import Answer, Growth
from router.calls.call import Call
from router.calls.conversation import answer_name, names_of
from router.calls.echo import Echo
from router.calls.events import Begun, CallEvent, Choice, Compared, Ended, Opening, Piece, Usage
from router.calls.memory import Memory
from router.calls.prompts import Prompt
from router.calls.running import running
from router.calls.story import answered, says, sent
from router.dispatch.steps import Dispatcher, Finished, Output, StepRequest
from router.policy.prices import FREE
from router.traces.hits import together
from router.traces.texts import Said
from router.traces.turns import Turn, with_turn
from tracehaul.wire.hashing import pack_tokens, token_count


class Accepted(msgspec.Struct, frozen=True):
    """A call that can run. Choice ``i`` belongs to prompt ``i // n``."""

    call: Call
    prompts: Sequence[Prompt]
    steps: Sequence[StepRequest]
    """One for each choice."""
    answers: Sequence[Answer]
    """One for each choice, all empty."""
    echoes: Sequence[Echo]
    """One for each prompt, where the client wants them."""
    beginning: bytes = b""
    """As in :class:`router.calls.identity.Identity`."""
    compared: Compared | None = None
    """Of the first prompt; None: nothing was to be compared."""


class Outlet(Protocol):
    """Where pieces of an answer go that need not wait for :meth:`Run.next`."""

    @property
    def ready(self) -> bool:
        """Whether it would take one now."""
        ...

    def take(self, piece: Piece) -> None:
        """Take one; only while it is ready."""
        ...


class Run:
    """Runs an accepted call inside a context, whose end aborts what still runs."""

    outlet: Outlet | None = None
    """While somebody waits in :meth:`next`: what can go this way does, and is not returned."""

    def __init__(self, accepted: Accepted, dispatcher: Dispatcher, memory: Memory) -> None:
        self._accepted = accepted
        self._options = accepted.call.options
        self._answers = accepted.answers
        self._dispatcher = dispatcher
        self._memory = memory
        plain = accepted.answers[0].plain and not self._options.continuous_usage and not accepted.call.keyed
        self._running = running(dispatcher, accepted.steps, self._options.n, self._tell if plain else None)
        self._openings: list[Opening | None] = [None] * len(accepted.answers)
        """Of the choices that have begun."""
        self._choices_left = len(accepted.answers)
        """Those that have not ended."""
        self._told = [False] * len(accepted.answers)
        """The choices of which the traces know that they are over."""

    async def __aenter__(self) -> "Run":
        await self._running.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._running.__aexit__(kind, error, trace)
        for index in range(len(self._answers)):
            self._answered(index)

    @property
    def done(self) -> bool:
        """Every choice has ended."""
        return self._choices_left == 0

    async def next(self) -> list[CallEvent]:
        """What happened since the last call, in order; waits for something.

        Raises:
            Exception: what the first step to fail raised, once everything before it was returned.
        """
        events: list[CallEvent] = []
        for index, event in await self._running.next():
            for one in singly(event) if self._accepted.call.keyed else (event,):
                self._take(index, one, events)
        return events

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(prompt.tokens for prompt in self._accepted.prompts)

    @property
    def output_tokens(self) -> int:
        """Of all choices, so far."""
        return sum(len(answer.tokens) for answer in self._answers)

    @property
    def prompt_tokens_anew(self) -> int:
        """Of the prompts that were not asked for before."""
        n, steps = self._options.n, self._accepted.steps
        return sum(p.tokens for at, p in enumerate(self._accepted.prompts) if not steps[at * n].begun.packed)

    @property
    def output_tokens_anew(self) -> int:
        """Of all choices, so far, without those that were sampled when it was asked for before."""
        return self.output_tokens - sum(
            min(len(answer.tokens), token_count(step.begun.packed))
            for answer, step in zip(self._answers, self._accepted.steps, strict=True)
        )

    def choices(self) -> list[Choice]:
        """All of them, once they have ended."""
        assert self.done
        return [
            answer.whole(opening)
            for answer, opening in zip(self._answers, self._openings, strict=True)
            if opening is not None
        ]

    def usage(self) -> Usage:
        """Tokens so far. A position of a prompt counts as cached if no choice computed it."""
        n = self._options.n
        prompts = self._accepted.prompts
        cached = 0
        for index, prompt in enumerate(prompts):
            computed_from = min(answer.usage.computed_from for answer in self._answers[index * n : (index + 1) * n])
            cached += min(computed_from, prompt.tokens)
        parts = [answer.usage for answer in self._answers]
        hits, compared = together([answer.hits for answer in self._answers]), self._accepted.compared
        if compared is not None and hits.changed is not None and compared.tokens == 0:
            compared = msgspec.structs.replace(compared, tokens=hits.changed.tokens)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=cached,
            output_tokens=self.output_tokens,
            reasoning_tokens=sum(answer.reader.reasoning_tokens for answer in self._answers),
            resident_tokens=sum(part.resident_tokens for part in parts),
            pulled_tokens=sum(part.pulled_tokens for part in parts),
            pulled_bytes=sum(part.pulled_bytes for part in parts),
            pull_s=sum(part.pull_s for part in parts),
            missed_blocks=sum(part.missed_blocks for part in parts),
            prefill_fallback=next((part.prefill_fallback for part in parts if part.prefill_fallback), ""),
            hits=hits,
            bill=sum((self._dispatcher.bill(step.step) for step in self._accepted.steps), FREE),
            unit=self._dispatcher.unit,
            compared=compared,
        )

    def _tell(self, tokens: list[int]) -> bool:
        """Of the only choice, which no text ends."""
        outlet = self.outlet
        if outlet is None or self._openings[0] is None or not outlet.ready:
            return False
        outlet.take(Piece(0, self._answers[0].grow(tokens), tokens, ()))
        return True

    def _take(self, index: int, event: Output | Finished, events: list[CallEvent]) -> None:
        """Let an answer grow by what happened, and add to ``events`` what that is."""
        if isinstance(event, Output) and event.prompt_logprobs:
            self._accepted.echoes[index // self._options.n].logprobs.extend(event.prompt_logprobs)
            return
        answer = self._answers[index]
        if answer.reason is not None:
            return
        growth = self._grow(answer, event)
        if growth is None:
            return
        reason = answer.reason
        if reason is not None:
            self._choices_left -= 1
            if isinstance(event, Output):
                self._running.end(index)
        usage = self.usage() if self._options.continuous_usage else None
        if self._openings[index] is None:
            self._openings[index] = opening = self._opening(index)
            events.append(Begun(index, opening, self.usage() if self._options.opening_usage else usage))
        events.append(Piece(index, growth.said, growth.tokens, growth.marks, usage))
        if reason is not None:
            events.append(Ended(index, reason, answer.reader.called_in_pieces, usage, answer.stop))
            self._answered(index)

    def _grow(self, answer: Answer, event: Output | Finished) -> Growth | None:
        """None: nothing is wanted of it."""
        nothing = self._options.max_tokens == 0
        if isinstance(event, Finished):
            answer.hits = event.hits
            return answer.nothing(event.usage) if nothing else answer.finish(event.reason, event.usage)
        if nothing:
            return None
        answer.usage = event.usage or answer.usage
        answer.hits = event.hits or answer.hits
        return answer.push(event.tokens, event.logprobs)

    def _opening(self, index: int) -> Opening:
        at = index // self._options.n
        ids = self._accepted.prompts[at].ids if self._options.return_token_ids else None
        if not self._accepted.echoes:
            return Opening(prompt_ids=ids)
        echo = self._accepted.echoes[at]
        return Opening(echo.text, echo.marks, ids)

    def _answered(self, index: int) -> None:
        """A choice is over: the trace is told once, with what is known of it by then."""
        if self._told[index]:
            return
        self._told[index] = True
        n, call = self._options.n, self._accepted.call
        step, answer, prompt = self._accepted.steps[index], self._answers[index], self._accepted.prompts[index // n]
        said, tools, heard = None, None, None
        if answer.reason is not None and not step.final:
            if prompt.encoded is not None:
                # After a stop string the client has the text up to it, which may end inside a token; and a text that
                # shows what others hide is no template's.
                hides = not (self._options.include_stops or self._options.special_shown)
                whole_said = hides and not answer.matched
                text, ids = (answer.text, answer.generated) if whole_said else ("", ())
                turns = prompt.encoded.turns
                if turns and whole_said:
                    told = answered(answer.reader.whole)
                    turns = with_turn(turns, Turn(sent(told), says(told), len(prompt.encoded.text) + len(text)))
                said = Said(prompt.encoded, text, pack_tokens(ids), turns, call.model)
            if prompt.conversation:
                whole = answered(answer.reader.whole)
                tools = names_of([made.name for made in whole.tool_calls])
                if before := self._accepted.beginning:
                    heard = answer_name(
                        before, whole.content, [(made.name, made.arguments) for made in whole.tool_calls]
                    )
        # The prompts after the first are traces of their own: the response's name means the first.
        response = call.id if index < n else None
        final = step.final and answer.reason is not None
        self._memory.answered(
            (step.salt, step.trace),
            step.step,
            response=response,
            tools=tools,
            said=said,
            heard=heard,
            final=final,
            done=answer.reason is not None,
        )


def singly(event: Output | Finished) -> list[Output | Finished]:
    """The same, each token by itself."""
    if isinstance(event, Finished) or len(event.tokens) < 2:
        return [event]
    marks = event.logprobs
    first = Output(
        event.tokens[:1], event.usage, event.hits, None if marks is None else marks[:1], event.prompt_logprobs
    )
    rest = [
        Output([token], logprobs=None if marks is None else marks[at : at + 1])
        for at, token in enumerate(event.tokens[1:], start=1)
    ]
    return [first, *rest]
