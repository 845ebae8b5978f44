"""JSON of clients that cut texts within a character. Pure."""

import re

_LONE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
"""Half of a surrogate pair, written as an escape."""
_RAW = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
"""The same, written as if UTF-8 could hold it."""
_PAIR, _HIDDEN = b"\\\\", b"\0\0"


def mended(data: bytes) -> bytes | None:
    """What should be JSON, with U+FFFD for each half of a surrogate pair; None where it has none.

    Such a text stays in its conversation: refused once, it would be for ever.
    """
    # A backslash that is written as two begins no escape; nothing of JSON is written with NUL.
    found = _LONE.sub(rb"\\ufffd", data.replace(_PAIR, _HIDDEN)).replace(_HIDDEN, _PAIR)
    found = _RAW.sub(b"\xef\xbf\xbd", found)
    return None if found == data or b"\0" in data else found
