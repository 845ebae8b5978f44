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
counts: Counter[str] = Counter()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """A call asks for a model, where it may but does not, and for at most so many tokens."""
    body, fields = case.body, FIELDS.get(case.path)
    if fields is None or not isinstance(body, dict):
        return
    if case.meta is not None and case.meta.generation.mode.is_positive:
        body.setdefault("model", os.environ["FUZZ_MODEL"])
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
