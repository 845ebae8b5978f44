"""Tools as responses name them, in the words of chat completions. Pure."""

from collections.abc import Sequence
from typing import Any

from router.calls.errors import invalid, unsupported

OURS = ("function", "custom")
"""Kinds whose calls the client answers. Of others, which a service runs itself, the model is not told."""


def honoured(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Those that the model is told of, as they came."""
    return None if tools is None else [tool for tool in tools if tool.get("type") in OURS]


def chat_tools(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The same tools in the form of chat completions."""
    return None if tools is None else [_tool(tool) for tool in tools]


def chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """``tool_choice`` in the form of chat completions.

    Raises:
        CallFailed: it names a tool that nobody here runs.
    """
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind == "allowed_tools":
        allowed = choice.get("tools")
        if not isinstance(allowed, list) or not all(isinstance(tool, dict) for tool in allowed):
            raise invalid("tool_choice.tools must be a list of tools", "tool_choice.tools", "invalid_type")
        inside = {"mode": choice.get("mode"), "tools": [_named(tool) for tool in allowed]}
        return {"type": kind, "allowed_tools": inside}
    if kind not in OURS:
        raise unsupported("tool_choice", f"a tool_choice of type {str(kind)[:64]!r}")
    return _named(choice)


def custom_names(tools: Sequence[dict[str, Any]] | None) -> frozenset[str]:
    """Names of the tools that take a text instead of arguments."""
    return frozenset(str(tool.get("name")) for tool in tools or () if tool.get("type") == "custom")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    kind = str(tool.get("type"))
    inside = {key: value for key, value in tool.items() if key != "type"}
    form = inside.get("format")
    if kind == "custom" and isinstance(form, dict) and form.get("type") == "grammar":
        inside["format"] = {"type": "grammar", "grammar": {k: v for k, v in form.items() if k != "type"}}
    return {"type": kind, kind: inside}


def _named(tool: dict[str, Any]) -> dict[str, Any]:
    kind = str(tool.get("type"))
    return {"type": kind, kind: {"name": tool.get("name")}}
