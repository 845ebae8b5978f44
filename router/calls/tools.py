"""The tools of a call: which there are, which must be called, and how the model writes a call. Pure."""

from typing import Any

import msgspec

from router.calls.tool_formats import BEGIN, ToolFormat


class Function(msgspec.Struct, frozen=True):
    """One tool's function."""

    name: str
    parameters: dict[str, Any] | None = None
    """A JSON schema of its arguments; None: it takes any object."""
    strict: bool | None = None
    """What of the schema cannot be enforced is refused; else it is left to the model."""
    custom: bool = False
    """It stands for a custom tool: see :mod:`router.calls.custom`."""


class Tools(msgspec.Struct, frozen=True):
    """The tools of a call that may use them."""

    functions: tuple[Function, ...]
    """All that the model is told of."""
    forced: tuple[Function, ...]
    """Those of which it has to call one; none: it calls what it likes, or nothing."""
    parallel: bool
    """Whether one answer may have several calls."""
    told: list[dict[str, Any]]
    """All of them as chat templates read them: ``{"type": "function", "function": {...}}``."""
    allowed: tuple[Function, ...] | None = None
    """Those that it may call; None: all."""

    @property
    def callable(self) -> tuple[Function, ...]:
        """What can be called."""
        return self.functions if self.allowed is None else self.allowed

    @property
    def names(self) -> frozenset[str]:
        """Of what can be called."""
        return frozenset(function.name for function in self.callable)

    @property
    def customs(self) -> frozenset[str]:
        """Names of the custom tools."""
        return frozenset(function.name for function in self.functions if function.custom)


def format_of(template: str | None) -> ToolFormat:
    """How a model writes calls, by what its chat template shows it of them."""
    template = template or ""
    if BEGIN["mistral"] in template:
        return "mistral"
    if BEGIN["hermes"] not in template and (BEGIN["llama3"] in template or "ipython" in template):
        return "llama3"
    return "hermes"
