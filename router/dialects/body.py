"""From a body's bytes to the type that a dialect gives it. Pure."""

import re
from typing import TypeVar

import msgspec

from router.calls.errors import invalid

T = TypeVar("T", bound=msgspec.Struct)

_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
_LONE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
"""Half of a surrogate pair, written as an escape."""
_RAW = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
"""The same, written as if UTF-8 could hold it."""
_PAIR, _HIDDEN = b"\\\\", b"\0\0"
INVALID_JSON = "invalid_json"


def parse(body: bytes, kind: type[T]) -> T:
    """The request in a body.

    Raises:
        CallFailed: it is no JSON, or not of that type; names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        found = _PATH.search(message)
        path = found.group(1) if found else ""
        message = message[: found.start()] if found else message
        if missing := _MISSING.search(message):
            param = f"{path}.{missing.group(1)}" if path else missing.group(1)
            raise invalid(f"missing required parameter: '{param}'", param, "missing_required_parameter") from None
        where = f" for '{path}'" if path else ""
        raise invalid(f"invalid value{where}: {message}", path or None, "invalid_type") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise invalid(f"the body could not be parsed as JSON: {error}", code=INVALID_JSON) from None
    except RecursionError:
        raise invalid("the body is nested too deeply", code=INVALID_JSON) from None


def mended(body: bytes) -> bytes | None:
    """A body that is no JSON, with U+FFFD for each half of a surrogate pair; None where it has none.

    A text that was cut between the halves of a pair stays in its conversation: refused once, it would be for ever.
    """
    # A backslash that is written as two begins no escape; nothing of JSON is written with NUL.
    found = _LONE.sub(rb"\\ufffd", body.replace(_PAIR, _HIDDEN)).replace(_HIDDEN, _PAIR)
    found = _RAW.sub(b"\xef\xbf\xbd", found)
    return None if found == body or b"\0" in body else found
