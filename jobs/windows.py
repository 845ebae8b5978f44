"""Completion windows: by when a batch must be over. Pure."""

import re

_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])", re.ASCII)
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
WINDOW_S_MIN = 60
WINDOW_S_MAX = 30 * 86_400


def window_s(text: str) -> int:
    """Seconds of ``30m``, ``1h``, ``24h``, ``7d``.

    Raises:
        ValueError: it is no such window, or too short or too long; says so.
    """
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not WINDOW_S_MIN <= seconds <= WINDOW_S_MAX:
        raise ValueError("a completion window is a number and s, m, h or d, from 1m to 30d: such as 30m, 1h or 24h")
    return seconds
