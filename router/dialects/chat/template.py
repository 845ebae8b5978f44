"""What a request says to the model's chat template. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from router.calls.call import Conversation
from router.calls.errors import invalid
from router.dialects.chat.messages import messages_of
from router.dialects.chat.requests import ChatMessage, ChatRequest
from router.dialects.openai.response import Told, priority_told, tier_used
from router.dialects.openai.tools import names_of

GIVEN = frozenset(
    (
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "raise_exception",
        "strftime_now",
        "chat_template",
        "tokenize",
    )
)
"""What templates are always given, or their convention keeps for itself."""
THINKS_NOT = ("none", "minimal")


def conversation_of(request: ChatRequest, tools: Sequence[dict[str, Any]] | None) -> Conversation:
    """The request's conversation; ``tools``: all that it names.

    Raises:
        CallFailed: a message, or what is said to the template, cannot be honoured.
    """
    opens, goes_on = generation_prompt_of(request)
    return Conversation(
        messages_of(request.messages),
        names_of(tools),
        variables=variables_of(request),
        add_generation_prompt=opens,
        continue_final_message=goes_on,
    )


def variables_of(request: ChatRequest) -> Mapping[str, Any] | None:
    """What the template may read beside the messages; None: nothing.

    Raises:
        CallFailed: it names what the template is always given.
    """
    wanted = request.chat_template_kwargs or {}
    for name in wanted:
        if name in GIVEN:
            raise invalid(f"{name[:64]!r} is not for chat_template_kwargs to say", f"chat_template_kwargs.{name}")
    effort = request.reasoning_effort
    if effort is None:
        return wanted or None
    return {"reasoning_effort": effort, "enable_thinking": effort not in THINKS_NOT, **wanted}


def told_of(request: ChatRequest, template: str | None) -> Told:
    """What the answer says of the request's fields. ``template``: the model's, which may read some."""
    effort: str | UnsetType | None = UNSET
    if request.reasoning_effort is not None:
        heeded = template is not None and ("enable_thinking" in template or "reasoning_effort" in template)
        effort = request.reasoning_effort if heeded else None
    return Told(
        service_tier=UNSET if request.service_tier is None else tier_used(request.service_tier),
        store=None if request.store else UNSET,
        reasoning_effort=effort,
        priority=priority_told(request.priority),
    )


def generation_prompt_of(request: ChatRequest) -> tuple[bool, bool]:
    """``add_generation_prompt`` and ``continue_final_message``, which excludes it.

    Raises:
        CallFailed: both are wanted, or there is no message that could go on.
    """
    if not request.continue_final_message:
        return request.add_generation_prompt is not False, False
    if request.add_generation_prompt:
        raise invalid("add_generation_prompt and continue_final_message contradict each other", "add_generation_prompt")
    if not request.messages or not _goes_on(request.messages[-1]):
        message = "continue_final_message needs a last message of the assistant's, without calls"
        raise invalid(message, "continue_final_message")
    return False, True


def _goes_on(message: ChatMessage) -> bool:
    return message.role == "assistant" and not message.tool_calls and message.function_call is None
