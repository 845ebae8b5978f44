"""The pages that count: prompts in tokens, in the forms of those who ask."""

import random

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.calls.call import Call
from router.calls.calls import Calls
from router.calls.errors import unavailable
from router.calls.identity import fresh_name
from router.calls.noise import without_noise
from router.calls.prompts import check_ids
from router.dialects.body import parse
from router.dialects.messages import Messages
from router.dialects.tokens.requests import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, asked
from router.dispatch.steps import Dispatcher
from router.http.access import caller_of
from router.http.asgi import body_of
from router.http.config import ApiConfig
from router.http.errors import STATUS, headers_of
from router.http.pages import json_response
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


class TokenPages:
    """The endpoints. Each counts as a call in progress."""

    def __init__(
        self,
        calls: Calls,
        dispatcher: Dispatcher,
        responses: ResponsesEndpoint,
        config: ApiConfig,
        offload: Offload,
        dice: random.Random,
    ) -> None:
        self._calls = calls
        self._dispatcher = dispatcher
        self._responses = responses
        self._config = config
        self._offload = offload
        self._dice = dice
        self._messages = Messages()

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``."""
        with self._calls.admission.admitted():
            body = await self._body(request)
            wanted = parse(body, TokenizeRequest)
            model = self._model(wanted.model, request)
            card = self._dispatcher.model(model)
            if card is None:
                raise unavailable(f"no decode worker of {model} is ready")
            text = self._calls.text(model)
            call = asked(wanted, model, fresh_name(self._dice), len(body))
            prompt = wanted.prompt
            if prompt is None:
                ids = await self._calls.tokens(call)
            else:
                special = wanted.add_special_tokens is not False
                ids = await self._offload.run(lambda: text.encode(prompt, special=special))
            pieces = None
            if wanted.return_token_strs:
                pieces = await self._offload.run(lambda: [text.token_text(token) for token in ids])
            return json_response(Tokenized(len(ids), card.context_max, ids, pieces))

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``."""
        with self._calls.admission.admitted():
            wanted = parse(await self._body(request), DetokenizeRequest)
            text = self._calls.text(self._model(wanted.model, request))
            check_ids(wanted.tokens, text.vocab_size, "tokens")
            data = b"".join(map(text.token_bytes, wanted.tokens))
            return json_response(Detokenized(data.decode(errors="replace")))

    async def message_tokens(self, request: Request) -> Response:
        """``POST /v1/messages/count_tokens``; fails in the form of messages."""
        try:
            with self._calls.admission.admitted():
                body = await self._body(request)
                call = self._messages.counted(body, fresh_name(self._dice), self._calls)
                call = caller_of(request.scope).placed(call)
                return json_response(MessageTokens(await self._count(call)))
        except Exception as error:
            failure = translate(error)
            told = self._messages.failed(failure)
            return Response(told, STATUS[failure.cause], headers_of(failure), media_type="application/json")

    async def response_tokens(self, request: Request) -> Response:
        """``POST /v1/responses/input_tokens``."""
        with self._calls.admission.admitted():
            call = self._responses.counted(await self._body(request), caller_of(request.scope))
            return json_response(ResponseTokens(await self._count(call)))

    def _model(self, name: str | None, request: Request) -> str:
        """The model that is asked for. Raises CallFailed: there is none, or the caller may not use it."""
        model = self._calls.model(name)
        caller_of(request.scope).use(model)
        return model

    async def _count(self, call: Call) -> int:
        call, _ = without_noise(call)
        return len(await self._calls.tokens(call))

    async def _body(self, request: Request) -> bytes:
        config = self._config
        return await body_of(request, bytes_max=config.body_bytes_max, timeout_s=config.body_timeout_s)
