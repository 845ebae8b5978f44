"""``/v1/chat/completions``: a conversation in, messages out."""

from collections.abc import Callable

from router.calls.call import Call, Conversation
from router.calls.text import Text
from router.dialects.body import parse
from router.dialects.chat.functions import asked
from router.dialects.chat.messages import messages_of
from router.dialects.chat.requests import ChatRequest
from router.dialects.chat.teller import ChatTeller
from router.dialects.chat.template import generation_prompt_of, told_of, variables_of
from router.dialects.openai.errors import OpenAIErrors
from router.dialects.openai.requests import options
from router.dialects.openai.response import Head
from router.dialects.openai.structured import wanted_of
from router.dialects.openai.tools import names_of, tools_of


class Chat(OpenAIErrors):
    """The dialect."""

    def read(self, body: bytes, fresh: str, created: int, text_of: Callable[[str], Text]) -> tuple[Call, ChatTeller]:
        request = parse(body, ChatRequest)
        opts = options(request)
        asks = asked(request)
        opens, goes_on = generation_prompt_of(request)
        conversation = Conversation(
            messages_of(request.messages),
            names_of(asks.tools),
            variables=variables_of(request),
            add_generation_prompt=opens,
            continue_final_message=goes_on,
        )
        call = Call(
            id=f"chatcmpl-{fresh}",
            model=request.model,
            wanted=wanted_of(request),
            tools=tools_of(asks.tools, asks.choice, asks.parallel),
            prompts=(conversation,),
            where="messages",
            options=opts,
            trace=request.trace_fields,
            priority=request.priority,
            tenant=request.tenant,
            nbytes=len(body),
        )
        text = text_of(call.model)
        head = Head(call.id, created, call.model, told_of(request, text.chat_template))
        return call, ChatTeller(head, opts, text, older=asks.older)
