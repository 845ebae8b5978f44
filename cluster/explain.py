"""``tracehaul explain``: one trace's story, from the router that runs it."""

from urllib.parse import quote

import msgspec

from cluster.api import Api
from cluster.rundir import ClusterFault
from router.traces.story import story
from router.traces.views import TraceView

TIMEOUT_S = 5.0
NOT_FOUND = 404


def fetch(api: Api, trace: str, salt: str) -> bytes:
    """What the router knows of a trace, as JSON.

    Raises:
        ClusterFault: no router answers there, or it does not know the trace.
    """
    answer = api.get(f"/v1/traces/{quote(trace, safe='')}", TIMEOUT_S, {"cache_salt": salt})
    if answer.status_code == NOT_FOUND:
        whose = f" of tenant {salt!r}" if salt else ""
        raise ClusterFault(
            f"the router knows no trace {trace!r}{whose}: GET {api.url}/v1/traces lists those that it knows"
        )
    if answer.is_error:
        raise ClusterFault(f"the router at {api.url} refuses: {answer.text[:500]}")
    return answer.content


def explain(api: Api, trace: str, salt: str) -> list[str]:
    """The story's lines.

    Raises:
        ClusterFault: as :func:`fetch`.
    """
    try:
        return story(msgspec.json.decode(fetch(api, trace, salt), type=TraceView))
    except msgspec.DecodeError as error:
        raise ClusterFault(f"{api.url} answers, but not as a tracehaul router of this version: {error}") from error
