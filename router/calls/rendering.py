"""From a conversation to its prompt's text. Pure."""

from collections.abc import Sequence
from typing import Any

from router.calls.call import Conversation
from router.calls.errors import invalid
from router.calls.text import Text

_HERE = "[tracehaul: the last message goes on here]"
"""Stands at the end of a message that goes on: what the template writes behind it is left out."""


def rendered(
    text: Text, asked: Conversation, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
) -> str:
    """The prompt that the chat template makes of ``messages``, which are those of ``asked`` as templates read them.

    Raises:
        CallFailed, InvalidRequest: the template does not take them, or does not show the message that is to go on.
    """
    if not asked.continue_final_message:
        return text.render(messages, tools, asked.add_generation_prompt, asked.variables)
    *before, last = messages
    goes_on = [*before, last | {"content": last["content"] + _HERE}]
    shown, found, _ = text.render(goes_on, tools, False, asked.variables).rpartition(_HERE)
    if not found:
        raise invalid("the chat template does not show the message that is to go on", "continue_final_message")
    return shown
