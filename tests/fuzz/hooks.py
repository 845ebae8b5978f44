"""What schemathesis does around each request, for fuzz.py: calls ask for little, and answers are counted."""

import atexit
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis

LIMIT = os.environ.get("FUZZ_MAX_TOKENS")
FIELDS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
    "/v1/responses/input_tokens": (),
}
INTEGER_MAX = 2**53
counts: Counter[str] = Counter()


def whole(value: Any) -> Any:
    """Without a fraction of zero: to JSON Schema 1.0 is an integer, and to those who type it not."""
    if isinstance(value, float) and value.is_integer() and abs(value) < INTEGER_MAX:
        return int(value)
    if isinstance(value, list):
        return [whole(each) for each in value]
    return {name: whole(each) for name, each in value.items()} if isinstance(value, dict) else value


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """What should be right asks for a model that is there, and its numbers are written as they are meant; a call asks
    for at most so many tokens."""
    if not isinstance(case.body, dict):
        return
    fields = FIELDS.get(case.path)
    if case.meta is not None and case.meta.generation.mode.is_positive:
        case.body = whole(case.body)
        if fields is not None or "model" in case.body:
            case.body["model"] = os.environ["FUZZ_MODEL"]
    body = case.body
    if LIMIT is None or not fields:
        return
    for name in fields:
        wanted = body.get(name)
        if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > int(LIMIT):
            body[name] = int(LIMIT)
    if not any(name in body for name in fields):
        body[fields[0]] = int(LIMIT)


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    counts[f"{case.method} {case.path} {response.status_code}"] += 1


atexit.register(lambda: Path(os.environ["FUZZ_COUNTS"]).write_text(json.dumps(counts)))
