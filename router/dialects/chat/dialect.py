"""``/v1/chat/completions``: a conversation in, messages out."""

from router.calls.call import Call
from router.dialects.base import Models
from router.dialects.body import parse
from router.dialects.chat.functions import asked
from router.dialects.chat.requests import ChatRequest
from router.dialects.chat.stored import asked_of
from router.dialects.chat.teller import ChatTeller
from router.dialects.chat.template import conversation_of, told_of
from router.dialects.openai.errors import OpenAIErrors
from router.dialects.openai.requests import options
from router.dialects.openai.response import Head, fingerprint
from router.dialects.openai.structured import wanted_of
from router.dialects.openai.tools import tools_of


class Chat(OpenAIErrors):
    """The dialect."""

    def read(self, body: bytes, fresh: str, created: int, models: Models) -> tuple[Call, ChatTeller]:
        request = parse(body, ChatRequest)
        opts = options(request)
        asks = asked(request)
        conversation = conversation_of(request, asks.tools)
        call = Call(
            id=f"chatcmpl-{fresh}",
            model=models.named(request.model),
            wanted=wanted_of(request),
            tools=tools_of(asks.tools, asks.choice, asks.parallel),
            prompts=(conversation,),
            where="messages",
            options=opts,
            trace=request.trace_fields,
            flex=request.service_tier == "flex",
            priority=request.priority,
            tenant=request.tenant,
            nbytes=len(body),
        )
        text = models.text(call.model)
        head = Head(call.id, created, call.model, fingerprint(text), told_of(request, text.chat_template))
        return call, ChatTeller(head, opts, text, older=asks.older, asked=asked_of(request))
