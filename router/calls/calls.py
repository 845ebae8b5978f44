"""From a call to steps: whose it is, whether it can be done, and what the workers are asked."""

import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
from blake3 import blake3

from router.calls.admission import Admission
from router.calls.again import ANEW, KEYED_S, UNANSWERED_S, Again, ask_name
from router.calls.allowed import allowed
from router.calls.answers import Answer
from router.calls.call import Asked, Call, Conversation, Options
from router.calls.conversation import lineage, sought
from router.calls.echo import Echo
from router.calls.errors import invalid, model_not_found, unavailable
from router.calls.events import Compared
from router.calls.forms import Form
from router.calls.identity import Identity, identify
from router.calls.limits import CallLimits
from router.calls.memory import Memory
from router.calls.prompts import Prompt, check_ids, numbered, output_budget
from router.calls.run import Accepted, Run
from router.calls.served import Served
from router.calls.text import Text
from router.calls.urgency import urgency
from router.dispatch.steps import Dispatcher, ModelCard, StepRequest
from tracehaul.runtime import clock
from tracehaul.runtime.deadline import until
from tracehaul.runtime.offload import Offload
from tracehaul.wire.ids import StepId, TraceId
from tracehaul.wire.steps import Constraint, Sampling

SEED_BITS = 63
UNLIMITED_TOKENS = 2**62
UNFORESEEN = random.SystemRandom()


class Calls:
    """Accepts calls and runs them, whatever dialect they came in."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        texts: Mapping[str, Text],
        limits: CallLimits,
        offload: Offload,
        dice: random.Random = UNFORESEEN,
    ) -> None:
        """``texts``: of each model that may be asked for, by its name. ``dice``: for seeds that nobody asks for."""
        self._dispatcher = dispatcher
        self._limits = limits
        self._dice = dice
        self._memory = Memory(dispatcher.book)
        self._served = {name: Served(text, name, self._memory, limits, offload) for name, text in texts.items()}
        self.admission = Admission(limits.requests_max)

    def text(self, model: str) -> Text:
        """Of that model; of any other where it is not known, for a call that will be refused."""
        served = self._served.get(model)
        return next(iter(self._served.values())).text if served is None else served.text

    def named(self, name: str | None) -> str:
        """What a call asks for that says this; the first model's name where it says none."""
        return name or next(iter(self._served))

    def model(self, name: str | None) -> str:
        """The same, of a model that may be asked for.

        Raises:
            CallFailed: there is none of that name.
        """
        found = self.named(name)
        if found not in self._served:
            raise model_not_found(found)
        return found

    def ready(self, model: str) -> bool:
        """Somebody serves it now, or it is none that may be asked for."""
        return model not in self._served or self._dispatcher.model(model) is not None

    async def tokens(self, call: Call, headers: Mapping[str, str]) -> list[int]:
        """A call's first prompt in tokens, of any length: those that it would have if it ran now.

        Args:
            call: the call.
            headers: as of :meth:`identified`.

        Raises:
            CallFailed, InvalidRequest: it cannot be rendered, or is empty.
        """
        served = self._served[self.model(call.model)]
        unlimited = ModelCard(call.model, UNLIMITED_TOKENS)
        fresh, asked = call.id, call.prompts[0]
        identity = self._identity(call, headers, fresh)
        trace, parent = identity.trace, identity.parent
        if trace == fresh and isinstance(asked, Conversation):
            place = self._memory.found(call.tenant, sought(asked, call.tenant), trace)
            trace, parent = place.trace, parent or place.parent
        prompts = await served.prompts.of(call, trace, parent, unlimited)
        return prompts[0].ids

    async def fetched(self, call: Call, headers: Mapping[str, str], fresh: str) -> None:
        """Have the call's trace come here if another router has it; the arguments are those of :meth:`identified`,
        before which it is awaited. A call that says nothing of a trace, or whose trace does not come, runs as it is.

        Raises:
            CallFailed: as :meth:`identified`.
        """
        if not self._memory.elsewhere:
            return
        asked, named = call.prompts[0], call.trace.previous_response_id or call.trace.baseline or ""
        identity = self._identity(call, headers, fresh)
        trace = None if identity.trace == fresh else identity.trace
        told = sought(asked, call.tenant) if trace is None and isinstance(asked, Conversation) else None
        await self._memory.arrive(call.tenant, trace, told, named)

    @contextmanager
    def identified(self, call: Call, headers: Mapping[str, str], fresh: str) -> Generator[Identity, None, None]:
        """The trace that a call belongs to, for as long as the call lasts.

        Args:
            call: the call.
            headers: what came beside its body; looked up by lower-case name.
            fresh: the name of a new trace.

        Raises:
            CallFailed: one of our own headers holds what is no id, or the call is far too long.
        """
        served, card = self._served.get(call.model), self._dispatcher.model(call.model)
        if served is not None and card is not None:
            served.prompts.check_length(call, card)
        identity = self._identity(call, headers, fresh)
        urgent = urgency(headers, clock.now_s(), call.priority, flex=call.flex)
        named = identity.trace != fresh
        limits = allowed(headers, call.trace.metadata)
        identity = msgspec.structs.replace(identity, urgency=urgent, named=named, limits=limits)
        asked = call.prompts[0]
        if not isinstance(asked, Conversation):
            yield identity
            return
        said = lineage(asked)
        identity = msgspec.structs.replace(identity, agent=said.agent, tools=said.called)
        if named:
            yield identity
            return
        told = sought(asked, call.tenant)
        with self._memory.placed(call.tenant, told, identity.trace) as place:
            parent, beginning = identity.parent or place.parent, told.conversation[-1] if told.conversation else b""
            yield msgspec.structs.replace(identity, trace=place.trace, parent=parent, beginning=beginning)

    def _identity(self, call: Call, headers: Mapping[str, str], fresh: str) -> Identity:
        return identify(headers, call.trace, lambda name: self._memory.response(call.tenant, name), fresh)

    async def accept(self, call: Call, identity: Identity) -> Run:
        """Make everything ready for a call's steps; the caller enters the run.

        Raises:
            CallFailed, ClusterError: it cannot be done; nothing has run.
        """
        served = self._served.get(call.model)
        if served is None:
            raise model_not_found(call.model)
        self._check(call, served.text)
        card = self._dispatcher.model(call.model)
        if card is None:
            raise unavailable(f"no decode worker of {call.model} is ready")
        async with until(identity.urgency.deadline_s):
            form = await served.forms.of(call)
            prompts = await served.prompts.of(call, identity.trace, identity.parent, card)
        accepted = self._accepted(call, served, form, prompts, identity, card)
        if call.trace.baseline is not None:
            accepted = msgspec.structs.replace(accepted, compared=self._compared(call, identity, prompts[0]))
        return Run(accepted, self._dispatcher, self._memory)

    def _compared(self, call: Call, identity: Identity, prompt: Prompt) -> Compared:
        """With the call's baseline."""
        trace = self._memory.response(call.tenant, call.trace.baseline or "")
        if trace is None:
            return Compared("unknown")
        if trace not in (identity.trace, identity.parent):
            return Compared("elsewhere")
        texts = self._memory.texts([(call.tenant, trace)])
        if texts and all(text.model != call.model for text in texts):
            return Compared("model", texts[0].tokens)
        return Compared("same" if prompt.changed is None else prompt.changed.section)

    def _check(self, call: Call, text: Text) -> None:
        prompts, options = len(call.prompts), call.options
        if prompts * options.n > self._limits.choices_max:
            param = "n" if prompts == 1 else call.where
            raise invalid(f"at most {self._limits.choices_max} choices are possible in one call", param)
        check_ids(options.stop_token_ids, text.vocab_size, "stop_token_ids")
        check_ids([token for token, _ in options.logit_bias], text.vocab_size, "logit_bias")

    def _accepted(
        self, call: Call, served: Served, form: Form, prompts: Sequence[Prompt], identity: Identity, card: ModelCard
    ) -> Accepted:
        options = call.options
        steps: list[StepRequest] = []
        answers: list[Answer] = []
        for at, prompt in enumerate(prompts):
            seed = self._seed(call) if options.seed is None else options.seed
            # Where only the prompt is wanted, one token runs along that nobody sees.
            wanted = None if options.max_tokens is None else max(options.max_tokens, 1)
            max_tokens = output_budget(prompt.tokens, wanted, card, call.where)
            constraint = served.forms.constraint(form, prompt.rendered)
            taken = _ids(call.prompts[at]) if form.tools is not None else frozenset[str]()
            for k in range(options.n):
                name = f"{call.id}-{len(steps)}"
                sampling = self._sampling(options, served.text, max_tokens, choice_seed(seed, k), constraint)
                trace = numbered(identity.trace, at)
                again = self._again(call, identity, trace, k, prompt.packed, sampling)
                answers.append(
                    Answer(
                        served.text.stream(None) if options.special_shown else served.forms.stream(form),
                        served.forms.reader(form, prompt.rendered, name, taken),
                        stops=options.stops,
                        stop_tokens=sampling.stop_tokens,
                        min_tokens=options.min_tokens,
                        include_stops=options.include_stops,
                    )
                )
                steps.append(
                    StepRequest(
                        step=StepId(name),
                        trace=trace,
                        parent=identity.parent,
                        prompt=prompt.packed,
                        sampling=sampling if again.seed is None else msgspec.structs.replace(sampling, seed=again.seed),
                        # Once for all choices of a prompt.
                        prompt_logprobs=options.logprobs if options.echo and k == 0 else None,
                        pool=card.pool,
                        salt=call.tenant,
                        tenant=call.tenant if call.quota is None else call.quota,
                        step_class=identity.urgency.step_class,
                        priority=identity.urgency.priority,
                        deadline_s=identity.urgency.deadline_s,
                        decode=identity.decode,
                        final=identity.final,
                        tools=identity.tools,
                        keep_s=call.keep_s,
                        changed=prompt.changed,
                        agent=identity.agent,
                        ask=again.name,
                        keyed=call.keyed,
                        begun=again.begun,
                        limits=identity.limits,
                        choices=options.n - k,
                    )
                )
        scored = options.logprobs is not None
        echoes = [Echo(served.text, prompt, scored=scored) for prompt in prompts] if options.echo else []
        return Accepted(call, prompts, steps, answers, echoes, identity.beginning)

    def _seed(self, call: Call) -> int:
        """Where the client has none."""
        if not call.keyed:
            return self._dice.getrandbits(SEED_BITS)
        return int.from_bytes(blake3(f"seed {call.id}".encode()).digest(8)) >> (64 - SEED_BITS)

    def _again(
        self, call: Call, identity: Identity, trace: TraceId, choice: int, prompt: bytes, sampling: Sampling
    ) -> Again:
        """What came of that choice when it was asked for before, if it was. A step that runs for somebody is nobody
        else's; of one that tells logprobs only the seed is the same, as nobody keeps these."""
        if not (call.keyed or identity.named) or sampling.logprobs is not None:
            return ANEW
        name = ask_name(call.id if call.keyed else "", choice, prompt, sampling)
        known = self._memory.asked((call.tenant, trace), name, KEYED_S if call.keyed else UNANSWERED_S)
        return Again(name) if known is None else Again(name, known.seed, known.begun)

    def _sampling(
        self, options: Options, text: Text, max_tokens: int, seed: int, constraint: Constraint | None
    ) -> Sampling:
        eos = () if options.ignore_eos else text.eos_tokens
        return Sampling(
            max_tokens=max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logit_bias=options.logit_bias,
            seed=seed,
            seeded=options.seed is not None,
            stop_tokens=tuple(dict.fromkeys((*eos, *options.stop_token_ids))),
            min_tokens=min(options.min_tokens, max_tokens),
            logprobs=options.logprobs,
            constraint=constraint,
        )


def _ids(asked: Asked) -> frozenset[str]:
    """Of the calls in a conversation."""
    if not isinstance(asked, Conversation):
        return frozenset()
    return frozenset(made.id for message in asked.messages for made in message.tool_calls)


def choice_seed(seed: int, choice: int) -> int:
    """A seed per choice of one prompt: the first choice is what ``n=1`` gives."""
    if choice == 0:
        return seed % 2**SEED_BITS
    digest = blake3(msgspec.json.encode((seed, choice))).digest(8)
    return int.from_bytes(digest) >> (64 - SEED_BITS)
