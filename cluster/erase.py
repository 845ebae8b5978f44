"""``tracehaul erase``: all that is kept of a tenant, at each router."""

from collections.abc import Sequence

import httpx
import msgspec

from cluster.api import Api
from cluster.rundir import ClusterFault

TIMEOUT_S = 60.0


class Erased(msgspec.Struct, frozen=True):
    """What there was at one."""

    traces: int
    responses: int
    chat_completions: int
    batches: int
    files: int


def erase(apis: Sequence[Api], tenant: str) -> list[tuple[str, Erased]]:
    """What there was at each of them.

    Raises:
        ClusterFault: one of them could not be asked, or did not erase all of it; those before it did.
    """
    return [(api.url, _erase(api, tenant)) for api in apis]


def _erase(api: Api, tenant: str) -> Erased:
    try:
        with api.client(TIMEOUT_S) as client:
            answer = client.delete("/v1/data", params={"cache_salt": tenant})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ClusterFault(f"no router answers at {api.url}: {error}") from error
    if answer.status_code in (401, 403):
        raise ClusterFault(f"the router at {api.url} wants a key that may steer: give one with --key")
    try:
        if answer.status_code == 200:
            return msgspec.json.decode(answer.content, type=Erased)
        why = msgspec.json.decode(answer.content)["error"]["message"]
    except (msgspec.DecodeError, LookupError, TypeError):
        why = f"it answers {answer.status_code}"
    raise ClusterFault(f"the router at {api.url} has not erased all of it: {why}")
