"""What clients send to ``/tokenize`` and ``/detokenize``, and receive. Pure."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from router.calls.call import Call, Plain
from router.calls.errors import invalid
from router.dialects.body import ModelName
from router.dialects.chat.requests import TOLD_MESSAGES, ChatMessage, ChatRequest
from router.dialects.chat.template import conversation_of
from router.dialects.openai.requests import SALT_CHARACTERS_MAX
from router.dialects.openai.tools import tools_of

TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /tokenize``: a prompt, or messages as in chat completions. Unknown fields are ignored."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], TOLD_MESSAGES] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    """What the model wants around a prompt; templates have it themselves."""
    return_token_strs: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=SALT_CHARACTERS_MAX)] | None = None
    """Whose conversation it is, as in calls."""


class Tokenized(msgspec.Struct, frozen=True):
    """The answer."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /detokenize``."""

    tokens: list[TokenId]
    model: ModelName | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """The answer."""

    prompt: str


def asked(request: TokenizeRequest, model: str, name: str, nbytes: int) -> Call:
    """The call whose prompt is asked for.

    Raises:
        CallFailed: there is none, or two, or it cannot be honoured.
    """
    if (request.prompt is None) == (request.messages is None):
        raise invalid("either prompt or messages are needed", "prompt")
    if request.messages is None:
        prompts = (Plain(request.prompt or ""),)
        return Call(
            id=name, model=model, prompts=prompts, where="prompt", tenant=request.cache_salt or "", nbytes=nbytes
        )
    chat = ChatRequest(
        model=model,
        messages=request.messages,
        chat_template_kwargs=request.chat_template_kwargs,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )
    prompts = (conversation_of(chat, request.tools),)
    tools = tools_of(request.tools, None, None)
    tenant = request.cache_salt or ""
    return Call(id=name, model=model, prompts=prompts, where="messages", tools=tools, tenant=tenant, nbytes=nbytes)
