"""``tracehaul explain``: one trace's story, from the router that runs it."""

from urllib.parse import quote

import httpx
import msgspec

from cluster.rundir import ClusterFault
from router.traces.story import story
from router.traces.views import TraceView

TIMEOUT_S = 5.0
NOT_FOUND = 404


def fetch(url: str, trace: str, salt: str) -> bytes:
    """What the router at ``url`` knows of a trace, as JSON.

    Raises:
        ClusterFault: no router answers there, or it does not know the trace.
    """
    address = f"{url.rstrip('/')}/v1/traces/{quote(trace, safe='')}"
    try:
        answer = httpx.get(address, params={"cache_salt": salt}, timeout=TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ClusterFault(f"no router answers at {url}: {error}") from error
    if answer.status_code == NOT_FOUND:
        whose = f" of tenant {salt!r}" if salt else ""
        raise ClusterFault(f"the router knows no trace {trace!r}{whose}: GET {url}/v1/traces lists those that it knows")
    if answer.is_error:
        raise ClusterFault(f"the router at {url} refuses: {answer.text[:500]}")
    return answer.content


def explain(url: str, trace: str, salt: str) -> list[str]:
    """The story's lines.

    Raises:
        ClusterFault: as :func:`fetch`.
    """
    try:
        return story(msgspec.json.decode(fetch(url, trace, salt), type=TraceView))
    except msgspec.DecodeError as error:
        raise ClusterFault(f"{url} answers, but not as a tracehaul router of this version: {error}") from error
