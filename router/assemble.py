"""The one place that puts a router together: the control plane for nodes, and the HTTP surface over it.

It has no server of its own: a cluster serves its application over sockets, the simulator in process.
"""

import random
from collections.abc import Callable, Mapping

import msgspec
from starlette.types import ASGIApp

from records.base import Records
from router.calls.calls import UNFORESEEN
from router.calls.text import Text
from router.dispatch.dispatch import Dispatch, DispatchConfig
from router.dispatch.journal import Journal
from router.fleet.members import Terms
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.jobs import Jobs
from router.http.keys import Keyring
from tracehaul.rpc.base import Service
from tracehaul.rpc.peers import Peers
from tracehaul.runtime.offload import Offload


class Router:
    """A router whose text may come later: nodes can join before it has read its tokenizer."""

    def __init__(self, peers: Peers, config: DispatchConfig, terms: Terms | None = None) -> None:
        self.dispatch = Dispatch(peers, config, terms)
        self.stats: dict[str, msgspec.Struct] = {
            "router": self.dispatch.stats,
            "retention": self.dispatch.retainer.stats,
        }
        """Counts of its life, by the part of it that counts."""
        self.journal: Journal | None = None

    @property
    def service(self) -> Service:
        """Serves the nodes that join."""
        return self.dispatch.members

    async def remember(self, records: Records, keep_s: float, editions: Mapping[str, str]) -> None:
        """Know the traces again that were written down, and write down what becomes of them; once, and before clients
        come. The arguments are those of :class:`router.dispatch.journal.Journal`."""
        dispatch = self.dispatch
        self.journal = Journal(records, dispatch.traces, dispatch.retainer.send, keep_s, editions)
        self.stats["journal"] = self.journal.stats
        dispatch.retainer.changed = self.journal.changed
        dispatch.book.written = self.journal
        await self.journal.start()

    def app(
        self,
        texts: Mapping[str, Text],
        config: ApiConfig,
        offload: Offload,
        metrics: Callable[[], bytes],
        dice: random.Random = UNFORESEEN,
        keyring: Keyring | None = None,
        jobs: Jobs | None = None,
    ) -> ASGIApp:
        """Serves clients; the arguments are those of :func:`router.http.app.create_app`."""
        return create_app(self.dispatch, texts, metrics, config, offload, dice, keyring=keyring, jobs=jobs)

    async def close(self) -> None:
        """Stop following the stores, and do nothing more for traces."""
        await self.dispatch.close()
        if self.journal is not None:
            await self.journal.close()
