"""The pages that count: prompts in tokens, in the forms of those who ask."""

import random
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.calls.call import Call
from router.calls.calls import Calls
from router.calls.errors import CallFailed, unavailable
from router.calls.identity import fresh_name
from router.calls.prompts import check_ids
from router.dialects.body import parse
from router.dialects.messages import Messages
from router.dialects.tokens.requests import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, asked
from router.dispatch.steps import Dispatcher
from router.http.access import Caller, Gate, caller_of
from router.http.asgi import body_of
from router.http.config import ApiConfig
from router.http.pages import json_response
from router.http.reading import WARNING, mending, quiet
from router.http.responses import ResponsesEndpoint
from router.http.translate import translate
from tracehaul.runtime.offload import Offload


class MessageTokens(msgspec.Struct, frozen=True):
    """``POST /v1/messages/count_tokens``."""

    input_tokens: int


class ResponseTokens(msgspec.Struct, frozen=True):
    """``POST /v1/responses/input_tokens``."""

    input_tokens: int
    object: str = "response.input_tokens"


class _Counted(NamedTuple):
    """What a page tells, and what was not taken as it is."""

    told: msgspec.Struct
    warnings: list[str]


class TokenPages:
    """The endpoints. Each counts as a call in progress, and to the requests of its key; what it counts is not spent.
    A conversation has the tokens that it would have in its trace."""

    def __init__(
        self,
        calls: Calls,
        dispatcher: Dispatcher,
        responses: ResponsesEndpoint,
        config: ApiConfig,
        offload: Offload,
        dice: random.Random,
        gate: Gate,
        refusal: Callable[[str, CallFailed], Response],
    ) -> None:
        """``refusal``: what is told of a failure, in the form of its path."""
        self._calls = calls
        self._dispatcher = dispatcher
        self._responses = responses
        self._config = config
        self._offload = offload
        self._dice = dice
        self._gate = gate
        self._refusal = refusal
        self._messages = Messages()

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``."""
        return await self._page(request, self._tokenized)

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``."""
        return await self._page(request, self._detokenized)

    async def message_tokens(self, request: Request) -> Response:
        """``POST /v1/messages/count_tokens``."""

        async def count(request: Request, caller: Caller, body: bytes) -> _Counted:
            fresh = fresh_name(self._dice)
            call, warnings = mending(body, lambda data: self._messages.counted(data, fresh, self._calls))
            call, dropped = quiet(caller.placed(call))
            return _Counted(MessageTokens(len(await self._ids(request, call))), [*warnings, *dropped])

        return await self._page(request, count)

    async def response_tokens(self, request: Request) -> Response:
        """``POST /v1/responses/input_tokens``."""

        async def count(request: Request, caller: Caller, body: bytes) -> _Counted:
            call, warnings = mending(body, lambda data: self._responses.counted(data, caller))
            call, dropped = quiet(call)
            return _Counted(ResponseTokens(len(await self._ids(request, call))), [*warnings, *dropped])

        return await self._page(request, count)

    async def _tokenized(self, request: Request, caller: Caller, body: bytes) -> _Counted:
        wanted, warnings = mending(body, lambda data: parse(data, TokenizeRequest))
        model = self._model(wanted.model, caller)
        card = self._dispatcher.model(model)
        if card is None:
            raise unavailable(f"no decode worker of {model} is ready")
        text = self._calls.text(model)
        call, dropped = quiet(caller.placed(asked(wanted, model, fresh_name(self._dice), len(body))))
        prompt = wanted.prompt
        if prompt is None:
            ids = await self._ids(request, call)
        else:
            special = wanted.add_special_tokens is not False
            ids = await self._offload.run(lambda: text.encode(prompt, special=special))
        pieces = None
        if wanted.return_token_strs:
            pieces = await self._offload.run(lambda: [text.token_text(token) for token in ids])
        return _Counted(Tokenized(len(ids), card.context_max, ids, pieces), [*warnings, *dropped])

    async def _detokenized(self, request: Request, caller: Caller, body: bytes) -> _Counted:
        wanted = parse(body, DetokenizeRequest)
        text = self._calls.text(self._model(wanted.model, caller))
        check_ids(wanted.tokens, text.vocab_size, "tokens")
        data = b"".join(map(text.token_bytes, wanted.tokens))
        return _Counted(Detokenized(data.decode(errors="replace")), [])

    async def _page(self, request: Request, count: Callable[[Request, Caller, bytes], Awaitable[_Counted]]) -> Response:
        caller, config = caller_of(request.scope), self._config
        try:
            self._gate.began(caller)
            try:
                with self._calls.admission.admitted():
                    body = await body_of(request, bytes_max=config.body_bytes_max, timeout_s=config.body_timeout_s)
                    counted = await count(request, caller, body)
            finally:
                self._gate.ended(caller)
        except Exception as error:
            answer = self._refusal(request.url.path, translate(error))
        else:
            answer = json_response(counted.told)
            answer.raw_headers.extend((WARNING, warning.encode()) for warning in counted.warnings)
        answer.raw_headers.extend(self._gate.standing(caller))
        return answer

    def _model(self, name: str | None, caller: Caller) -> str:
        """The model that is asked for. Raises CallFailed: there is none, or the caller may not use it."""
        model = self._calls.model(name)
        caller.use(model)
        return model

    async def _ids(self, request: Request, call: Call) -> list[int]:
        return await self._calls.tokens(call, request.headers)
