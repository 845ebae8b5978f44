"""Whether an engine calls a plugin as the plugin expects to be called: looked at once, at its start."""

import inspect
from collections.abc import Mapping

from engines.blocks.config import EngineRefused


def check(engine: str, tested: str, base: type, expected: Mapping[str, tuple[str, ...]]) -> None:
    """Compare the methods of the engine's own base class with those of the versions that were tested.

    Args:
        engine: its name and version.
        tested: the versions that ``expected`` is of.
        base: its class that the plugin's is of.
        expected: the parameters of each method that the engine calls or is called by, without ``self``.

    Raises:
        EngineRefused: one is missing or takes something else.
    """
    for name, parameters in expected.items():
        method = getattr(base, name, None)
        if method is None:
            raise EngineRefused(f"tracehaul: {engine} has no {base.__name__}.{name}: the plugin is for {tested}")
        found = tuple(key for key in inspect.signature(method).parameters if key not in ("self", "cls"))
        if found != parameters:
            raise EngineRefused(
                f"tracehaul: {engine}'s {base.__name__}.{name} takes ({', '.join(found)}), "
                f"not ({', '.join(parameters)}): the plugin is for {tested}"
            )
