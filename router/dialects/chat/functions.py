"""Functions as chat completions had them before there were tools: ``functions``, ``function_call``. Pure."""

from collections.abc import Sequence
from typing import Any

import msgspec

from router.calls.errors import invalid
from router.dialects.chat.requests import ChatRequest


class Asked(msgspec.Struct, frozen=True):
    """The tools of a request, as :func:`router.dialects.openai.tools.tools_of` takes them."""

    tools: Sequence[dict[str, Any]] | None
    choice: str | dict[str, Any] | None
    parallel: bool | None
    older: bool = False
    """They are functions: so is what the answer calls, one of them at most."""


def asked(request: ChatRequest) -> Asked:
    """What a request says of tools, in either way.

    Raises:
        CallFailed: it mixes both.
    """
    choice = request.function_call
    if not request.functions and choice in (None, "none", "auto"):
        return Asked(request.tools, request.tool_choice, request.parallel_tool_calls)
    if request.tools or request.tool_choice is not None:
        param = "functions" if request.functions else "function_call"
        raise invalid("functions and function_call are an older form of tools and tool_choice: use one of them", param)
    tools = [{"type": "function", "function": function} for function in request.functions or ()]
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    elif choice not in (None, "none", "auto"):
        raise invalid("function_call is none, auto or names a function", "function_call", "invalid_value")
    return Asked(tools, choice, False, older=True)
