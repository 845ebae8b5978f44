"""``POST /v1/chat/completions`` and ``POST /v1/completions``: from a body to steps, from steps to an answer."""

import asyncio
import secrets
from collections.abc import Sequence

import msgspec
from blake3 import blake3
from msgspec import UNSET
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from router.api.answers import Answer
from router.api.asgi import ClientGone, Reply, disconnected, read_body
from router.api.config import ApiConfig
from router.api.conversation import conversation, names_of
from router.api.echo import Echo
from router.api.errors import ApiError, bad_request, translate, unavailable
from router.api.forms import Form, Forms
from router.api.identity import Identity, identify
from router.api.prompts import Prompt, Prompts, check_ids, numbered, output_budget, said, split
from router.api.reading import ChatReader
from router.api.requests import ChatRequest, CompletionRequest, Options, options, parse
from router.api.responses import ClusterUsage, CompletionTokensDetails, PromptTokensDetails, Usage
from router.api.running import Event, Running
from router.api.shapes import DONE, KEEPALIVE, ChatShape, Head, Shape, TextShape, UsageField
from router.api.text import Text, TextStream
from router.api.urgency import Urgency, urgency
from router.dispatch.steps import Dispatcher, Finished, ModelCard, Output, StepRequest
from router.traces.hits import together
from tracehaul.runtime import clock
from tracehaul.runtime.deadline import until
from tracehaul.runtime.offload import Offload
from tracehaul.wire.ids import StepId
from tracehaul.wire.steps import Constraint, Sampling

SEED_BITS = 63


class Call:
    """One accepted call: its steps, and its answers as they grow. Choice ``i`` belongs to prompt ``i // n``."""

    def __init__(
        self,
        opts: Options,
        prompts: Sequence[Prompt],
        steps: Sequence[StepRequest],
        shape: Shape,
        readings: Sequence[tuple[TextStream, ChatReader | None]],
        response: str,
        echoes: Sequence[Echo],
    ) -> None:
        assert len(steps) == len(prompts) * opts.n
        self.options = opts
        self.prompts = prompts
        self.steps = steps
        self.shape = shape
        self.response = response
        """What later calls may name to go on from here."""
        self.told: set[int] = set()
        """Choices that the traces know to be over."""
        self.echoes = echoes
        """One for each prompt, where the client wants them."""
        self.answers = [
            Answer(
                stream,
                reader,
                stops=opts.stops,
                stop_tokens=step.sampling.stop_tokens,
                min_tokens=opts.min_tokens,
            )
            for step, (stream, reader) in zip(steps, readings, strict=True)
        ]

    @property
    def done(self) -> bool:
        """Every choice has its finish reason."""
        return all(answer.reason is not None for answer in self.answers)

    def prompt(self, index: int) -> Prompt:
        """The prompt of a choice."""
        return self.prompts[index // self.options.n]

    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once, and a position of it as cached if no choice computed it."""
        n = self.options.n
        prompt_tokens = sum(prompt.tokens for prompt in self.prompts)
        cached = 0
        for index, prompt in enumerate(self.prompts):
            computed_from = min(answer.usage.computed_from for answer in self.answers[index * n : (index + 1) * n])
            cached += min(computed_from, prompt.tokens)
        output_tokens = sum(len(answer.tokens) for answer in self.answers)
        parts = [answer.usage for answer in self.answers]
        return Usage(
            prompt_tokens,
            output_tokens,
            prompt_tokens + output_tokens,
            PromptTokensDetails(cached),
            CompletionTokensDetails(sum(a.reader.reasoning_tokens for a in self.answers if a.reader is not None)),
            ClusterUsage(
                resident_tokens=sum(part.resident_tokens for part in parts),
                pulled_tokens=sum(part.pulled_tokens for part in parts),
                pulled_bytes=sum(part.pulled_bytes for part in parts),
                pull_s=sum(part.pull_s for part in parts),
                missed_blocks=sum(part.missed_blocks for part in parts),
                prefill_fallback=next((part.prefill_fallback for part in parts if part.prefill_fallback), ""),
                hits=together([answer.hits for answer in self.answers]),
            ),
        )

    def chunk_usage(self) -> UsageField:
        """What chunks other than the last say of usage."""
        if self.options.continuous_usage:
            return self.usage()
        return None if self.options.include_usage else UNSET


class Generation:
    """What both endpoints share: admission, prompts, running, and answering."""

    def __init__(self, dispatcher: Dispatcher, text: Text, config: ApiConfig, offload: Offload) -> None:
        self._dispatcher = dispatcher
        self._text = text
        self._config = config
        self._prompts = Prompts(text, offload, dispatcher.book)
        self._forms = Forms(text, None if config.tool_format == "auto" else config.tool_format)
        self.active = 0
        """Calls in progress."""

    async def serve(
        self, kind: type[ChatRequest] | type[CompletionRequest], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer one call, whatever happens."""
        reply = Reply(send, self._config.send_timeout_s)
        try:
            try:
                await self._admit(kind, scope, receive, reply)
            except asyncio.CancelledError:
                # Only the server's end cancels this task, and it ends here anyway.
                await reply.fail(unavailable("the server is stopping"))
            except ClientGone:
                pass
            except Exception as error:
                await reply.fail(translate(error))
        except ClientGone:
            pass

    async def _admit(
        self, kind: type[ChatRequest] | type[CompletionRequest], scope: Scope, receive: Receive, reply: Reply
    ) -> None:
        if self.active >= self._config.requests_max:
            raise unavailable("too many requests are in progress", "overloaded")
        self.active += 1
        try:
            body = await read_body(
                scope, receive, bytes_max=self._config.body_bytes_max, timeout_s=self._config.body_timeout_s
            )
            work = asyncio.create_task(self._answer(kind, Headers(scope=scope), body, reply))
            watch = asyncio.create_task(disconnected(receive))
            try:
                await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientGone
                work.result()
            finally:
                work.cancel()
                watch.cancel()
                await asyncio.gather(work, watch, return_exceptions=True)
        finally:
            self.active -= 1

    async def _answer(
        self, kind: type[ChatRequest] | type[CompletionRequest], headers: Headers, body: bytes, reply: Reply
    ) -> None:
        request = parse(body, kind)
        fresh = secrets.token_hex(16)
        opts, book = options(request), self._dispatcher.book
        identity = identify(headers, request.trace_fields, lambda name: book.response(opts.salt, name), fresh)
        urgent = urgency(headers, clock.now_s())
        if not isinstance(request, ChatRequest):
            await self._run(request, opts, identity, urgent, fresh, len(body), reply)
            return
        messages = conversation(request, opts.salt)
        identity = msgspec.structs.replace(identity, agent=messages.agent, tools=messages.called)
        if identity.trace != fresh:
            await self._run(request, opts, identity, urgent, fresh, len(body), reply)
            return
        place = book.place(opts.salt, messages.digests, messages.opening, identity.trace)
        try:
            parent = identity.parent or place.parent
            identity = msgspec.structs.replace(identity, trace=place.trace, parent=parent)
            await self._run(request, opts, identity, urgent, fresh, len(body), reply)
        finally:
            book.over(opts.salt, place.trace)

    async def _run(
        self,
        request: ChatRequest | CompletionRequest,
        opts: Options,
        identity: Identity,
        urgent: Urgency,
        fresh: str,
        body_bytes: int,
        reply: Reply,
    ) -> None:
        chat = isinstance(request, ChatRequest)
        reply.headers.append((b"x-trace-id", identity.trace.encode()))
        self._check_size(request, opts)
        card = self._dispatcher.model()
        if card is None:
            raise unavailable("no decode worker is ready")
        if request.model != card.name:
            raise model_not_found(request.model)

        traces = [(opts.salt, trace) for trace in (identity.trace, identity.parent) if trace]
        async with until(urgent.deadline_s):
            form = await self._forms.of(request, opts)
            if isinstance(request, ChatRequest):
                prompts = await self._prompts.chat(request, traces, body_bytes=body_bytes)
            else:
                prompts = await self._prompts.completion(request, traces)
        head = Head(("chatcmpl-" if chat else "cmpl-") + fresh, int(clock.wall_s()), card.name)
        call = self._call(request, opts, form, prompts, identity, urgent, card, head)
        try:
            await (self._stream(call, reply) if opts.stream else self._collect(call, reply))
        finally:
            for index in range(len(call.steps)):
                self._tell(call, index)

    def _check_size(self, request: ChatRequest | CompletionRequest, opts: Options) -> None:
        prompts = 1 if isinstance(request, ChatRequest) else len(split(request.prompt))
        if prompts * opts.n > self._config.choices_max:
            param = "n" if prompts == 1 else "prompt"
            raise bad_request(f"at most {self._config.choices_max} choices are possible in one call", param)
        check_ids(opts.stop_token_ids, self._text.vocab_size, "stop_token_ids")
        check_ids([token for token, _ in opts.logit_bias], self._text.vocab_size, "logit_bias")

    def _call(
        self,
        request: ChatRequest | CompletionRequest,
        opts: Options,
        form: Form,
        prompts: Sequence[Prompt],
        identity: Identity,
        urgent: Urgency,
        card: ModelCard,
        head: Head,
    ) -> Call:
        chat = isinstance(request, ChatRequest)
        steps: list[StepRequest] = []
        readings: list[tuple[TextStream, ChatReader | None]] = []
        for at, prompt in enumerate(prompts):
            seed = secrets.randbits(SEED_BITS) if opts.seed is None else opts.seed
            # Where only the prompt is wanted, one token runs along that nobody sees.
            wanted = None if opts.max_tokens is None else max(opts.max_tokens, 1)
            max_tokens = output_budget(prompt.tokens, wanted, card, "messages" if chat else "prompt")
            said = prompt.encoded.text if chat and prompt.encoded is not None else None
            constraint = self._forms.constraint(form, said)
            for k in range(opts.n):
                reader = None if said is None else self._forms.reader(form, said, f"{head.id}-{len(steps)}")
                readings.append((self._forms.stream(form), reader))
                steps.append(
                    StepRequest(
                        step=StepId(f"{head.id}-{len(steps)}"),
                        trace=numbered(identity.trace, at),
                        parent=identity.parent,
                        prompt=prompt.packed,
                        sampling=self._sampling(opts, max_tokens, choice_seed(seed, k), constraint),
                        # Once for all choices of a prompt.
                        prompt_logprobs=opts.logprobs if opts.echo and k == 0 else None,
                        salt=opts.salt,
                        tenant=opts.salt,
                        step_class=urgent.step_class,
                        priority=urgent.priority,
                        deadline_s=urgent.deadline_s,
                        decode=identity.decode,
                        final=identity.final,
                        tools=identity.tools,
                        agent=identity.agent,
                    )
                )
        echoes = [Echo(self._text, prompt, scored=opts.logprobs is not None) for prompt in prompts] if opts.echo else []
        if chat:
            shape = ChatShape(head, self._text, prompts[0].ids if opts.return_token_ids else None)
        else:
            told = [prompt.ids for prompt in prompts] if opts.return_token_ids else []
            ids = [ids for ids in told for _ in range(opts.n)]
            each = [echo for echo in echoes for _ in range(opts.n)] if opts.echo else None
            shape = TextShape(head, self._text, ids or None, each)
        return Call(opts, prompts, steps, shape, readings, head.id, echoes)

    def _sampling(self, opts: Options, max_tokens: int, seed: int, constraint: Constraint | None) -> Sampling:
        eos = () if opts.ignore_eos else self._text.eos_tokens
        return Sampling(
            max_tokens=max_tokens,
            temperature=opts.temperature,
            top_p=opts.top_p,
            top_k=opts.top_k,
            min_p=opts.min_p,
            repetition_penalty=opts.repetition_penalty,
            presence_penalty=opts.presence_penalty,
            frequency_penalty=opts.frequency_penalty,
            logit_bias=opts.logit_bias,
            seed=seed,
            stop_tokens=tuple(dict.fromkeys((*eos, *opts.stop_token_ids))),
            min_tokens=min(opts.min_tokens, max_tokens),
            logprobs=opts.logprobs,
            constraint=constraint,
        )

    async def _collect(self, call: Call, reply: Reply) -> None:
        async with Running(self._dispatcher, call.steps, call.options.n) as running:
            while not call.done:
                self._take(call, running, await running.next(None))
            await reply.json(200, call.shape.whole(call.answers, call.usage()))

    async def _stream(self, call: Call, reply: Reply) -> None:
        async with Running(self._dispatcher, call.steps, call.options.n) as running:
            while not call.done:
                events = await running.next(self._config.keepalive_s)
                chunks = self._take(call, running, events) if events else KEEPALIVE
                if chunks:
                    await reply.events(chunks)
            usage = call.shape.usage(call.usage()) if call.options.include_usage else b""
            await reply.events(usage + DONE, last=True)

    def _take(self, call: Call, running: Running, events: Sequence[Event]) -> bytes:
        """Let answers grow by what happened; returns what a stream tells of it."""
        chunks: list[bytes] = []
        for index, event in events:
            answer = call.answers[index]
            if isinstance(event, Output) and event.prompt_logprobs:
                call.echoes[index // call.options.n].logprobs.extend(event.prompt_logprobs)
                continue
            if answer.reason is not None:
                continue
            if isinstance(event, Finished):
                nothing = call.options.max_tokens == 0
                piece = answer.nothing(event.usage) if nothing else answer.finish(event.reason, event.usage)
                answer.hits = event.hits
            elif call.options.max_tokens == 0:
                continue
            else:
                piece = answer.push(event.tokens, event.logprobs)
                answer.usage = event.usage or answer.usage
                answer.hits = event.hits or answer.hits
                if answer.reason is not None:
                    running.end(index)
            if call.options.stream:
                usage = call.chunk_usage()
                chunks.append(call.shape.piece(index, piece, usage))
                if answer.reason is not None:
                    chunks.append(call.shape.end(index, answer.reason, usage))
            if answer.reason is not None:
                self._tell(call, index)
        return b"".join(chunks)

    def _tell(self, call: Call, index: int) -> None:
        """A choice is over: told once, with what is known of it by then."""
        if index in call.told:
            return
        call.told.add(index)
        step, answer = call.steps[index], call.answers[index]
        tools = heard = None
        if answer.reason is not None and not step.final:
            heard = said(call.prompt(index), answer)
            if answer.reader is not None:
                tools = names_of([made.name or "" for made in answer.reader.whole.calls])
        response = call.response if index < call.options.n else None
        self._dispatcher.book.answered(step.salt, step.trace, step.step, response=response, tools=tools, said=heard)


class Endpoint:
    """One path of the two, as an ASGI application."""

    def __init__(self, generation: Generation, kind: type[ChatRequest] | type[CompletionRequest]) -> None:
        self._generation = generation
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generation.serve(self._kind, scope, receive, send)


def model_not_found(name: str) -> ApiError:
    """404: nobody serves it."""
    return ApiError(404, f"the model {name[:128]!r} does not exist", param="model", code="model_not_found")


def choice_seed(seed: int, choice: int) -> int:
    """A seed per choice of one prompt: the first choice is what ``n=1`` gives."""
    if choice == 0:
        return seed % 2**SEED_BITS
    digest = blake3(msgspec.json.encode((seed, choice))).digest(8)
    return int.from_bytes(digest) >> (64 - SEED_BITS)
