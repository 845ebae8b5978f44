"""Recorded agents made smaller in lengths and in time. Pure.

Lengths and hash blocks are divided by one number, times by another. Where a simulated accelerator takes as much longer
for a token as the first is larger than the second, queues, caches and pauses stand to each other as they did.
"""

import math
from collections.abc import Mapping
from typing import Any

LENGTHS = ("in", "out")
TIMES = ("t", "api_time", "think_time", "ttft")
BEGINNINGS = ("tool_tokens", "system_tokens")


def smaller(trace: Mapping[str, Any], by: int, sooner: float) -> dict[str, Any]:
    """A trace of the kv-cache-tester's form, in which a token stands for ``by``, and a second for ``sooner``.

    Raises:
        KeyError: it has another form.
        ValueError: its hash blocks cannot be divided so.
    """
    if trace["block_size"] % by:
        raise ValueError(f"hash blocks of {trace['block_size']} tokens cannot be divided by {by}")
    return {
        **trace,
        **_beginnings(trace, by),
        "block_size": trace["block_size"] // by,
        "requests": [_request(request, by, sooner) for request in trace["requests"]],
    }


def _request(request: Mapping[str, Any], by: int, sooner: float) -> dict[str, Any]:
    times = {name: request[name] / sooner for name in TIMES if request.get(name) is not None}
    if request["type"] != "subagent":
        return {**request, **times, **{name: max(1, math.ceil(request[name] / by)) for name in LENGTHS}}
    lasted = request.get("duration_ms")
    return {
        **request,
        **times,
        **_beginnings(request, by),
        "duration_ms": None if lasted is None else int(lasted / sooner),
        "requests": [_request(inner, by, sooner) for inner in request["requests"]],
    }


def _beginnings(of: Mapping[str, Any], by: int) -> dict[str, int]:
    return {name: of[name] // by for name in BEGINNINGS if of.get(name) is not None}
