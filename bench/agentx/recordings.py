"""Recorded agents made smaller in lengths and in time alike. Pure.

Lengths, hash blocks and times are divided by one number. With what a simulated accelerator takes for a token left as it
is, queues, caches and pauses stand to each other as they did; only whole numbers of tokens are coarser.
"""

import math
from collections.abc import Mapping
from typing import Any

LENGTHS = ("in", "out")
TIMES = ("t", "api_time", "think_time", "ttft")
BEGINNINGS = ("tool_tokens", "system_tokens")


def smaller(trace: Mapping[str, Any], by: int) -> dict[str, Any]:
    """A trace of the kv-cache-tester's form, in which every token and every second stands for ``by``.

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
        "requests": [_request(request, by) for request in trace["requests"]],
    }


def _request(request: Mapping[str, Any], by: int) -> dict[str, Any]:
    times = {name: request[name] / by for name in TIMES if request.get(name) is not None}
    if request["type"] != "subagent":
        return {**request, **times, **{name: max(1, math.ceil(request[name] / by)) for name in LENGTHS}}
    lasted = request.get("duration_ms")
    return {
        **request,
        **times,
        **_beginnings(request, by),
        "duration_ms": None if lasted is None else lasted // by,
        "requests": [_request(inner, by) for inner in request["requests"]],
    }


def _beginnings(of: Mapping[str, Any], by: int) -> dict[str, int]:
    return {name: of[name] // by for name in BEGINNINGS if of.get(name) is not None}
