"""``/v1/messages``: blocks in, blocks out."""

import msgspec

from router.calls.call import Call, Options, TraceFields, Wanted
from router.calls.errors import CallFailed
from router.calls.structured import schema_constraint
from router.dialects.base import Models
from router.dialects.body import parse
from router.dialects.messages.answers import error_body
from router.dialects.messages.conversation import conversation_of, keep_s, tools_asked
from router.dialects.messages.requests import Asked, MessagesRequest
from router.dialects.messages.teller import PING, MessageTeller


class Messages:
    """The dialect."""

    keepalive = PING

    def read(self, body: bytes, fresh: str, created: int, models: Models) -> tuple[Call, MessageTeller]:
        request = parse(body, MessagesRequest)
        baseline = request.diagnostics.previous_message_id if request.diagnostics else None
        call = _call(request, f"msg_{fresh}", models, _options(request), len(body), baseline)
        return call, MessageTeller(call.id, call.model)

    def counted(self, body: bytes, fresh: str, models: Models) -> Call:
        """What ``/v1/messages/count_tokens`` counts. Raises CallFailed as :meth:`read` does."""
        return _call(parse(body, Asked), f"count_{fresh}", models, Options(), len(body))

    def failed(self, failure: CallFailed) -> bytes:
        return msgspec.json.encode(error_body(failure))

    def broken(self, failure: CallFailed) -> bytes:
        return b"event: error\ndata: " + self.failed(failure) + b"\n\n"


def _call(asked: Asked, name: str, models: Models, options: Options, nbytes: int, baseline: str | None = None) -> Call:
    return Call(
        id=name,
        model=models.named(asked.model),
        wanted=_wanted(asked),
        tools=tools_asked(asked),
        prompts=(conversation_of(asked),),
        where="messages",
        options=options,
        trace=TraceFields(baseline=baseline),
        keep_s=keep_s(asked),
        tenant=asked.cache_salt or "",
        nbytes=nbytes,
    )


def _wanted(asked: Asked) -> Wanted | None:
    form = asked.output_config.format if asked.output_config is not None else None
    if form is None:
        return None
    return Wanted(schema_constraint(form.schema, "output_config.format.schema"), "output_config.format")


def _options(request: MessagesRequest) -> Options:
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    return Options(
        stream=bool(request.stream),
        opening_usage=bool(request.stream),
        max_tokens=request.max_tokens,
        # A top_p of 0 leaves the likeliest token only.
        temperature=temperature if top_p > 0 else 0.0,
        top_p=top_p if top_p > 0 else 1.0,
        top_k=request.top_k or 0,
        seed=request.seed,
        stops=tuple(request.stop_sequences or ()),
    )
