"""An endpoint of OpenAI's form, as lines of a batch ask it."""

import httpx

from cluster.api import Api
from jobs.lines import Call
from jobs.retries import Answer, NoAnswer

CONNECT_S = 10.0


class Endpoint:
    """Implements :class:`jobs.asking.Asker`."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        """``client``: of the endpoint, with its key; the caller closes it."""
        self._client = client

    async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
        timeout = httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s), pool=None)
        headers = {"content-type": "application/json", "x-step-class": "standard" if urgent else "background"}
        try:
            got = await self._client.post(call.url, content=bytes(call.body), headers=headers, timeout=timeout)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return NoAnswer(f"nobody answers: {error}", reached=False)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return NoAnswer(f"{type(error).__name__}: {error}")
        told = got.headers.get("x-should-retry")
        return Answer(
            got.status_code,
            got.content,
            got.headers.get("x-request-id", ""),
            _seconds(got.headers.get("retry-after")),
            None if told is None else told == "true",
        )


def client(api: Api, concurrency: int) -> httpx.AsyncClient:
    """For so many calls at once.

    Raises:
        ClusterFault: the certificate cannot be read.
    """
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    return httpx.AsyncClient(**api.options(), limits=limits)


def _seconds(text: str | None) -> float | None:
    """Of ``Retry-After``; a date, which few send, counts as nothing."""
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None
