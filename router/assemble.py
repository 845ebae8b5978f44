"""The one place that puts a router together: the control plane for nodes, and the HTTP surface over it.

It has no server of its own: a cluster serves its application over sockets, the simulator in process.
"""

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from starlette.types import ASGIApp

from jobs.webhooks.outbox import Outbox
from records.base import Records
from router.calls.calls import UNFORESEEN
from router.calls.text import Text
from router.dispatch.config import DispatchConfig
from router.dispatch.dispatch import Dispatch
from router.dispatch.handover import Doorway, Handover
from router.dispatch.holdings import Holdings
from router.dispatch.journal import Journal
from router.fleet.members import Terms
from router.http.app import create_app
from router.http.chats import Chats
from router.http.config import ApiConfig
from router.http.jobs import Jobs
from router.http.keys import Keyring
from router.http.others import Others, answered
from router.http.outliving import Outliving
from router.policy.prices import Prices
from router.traces.events import Event, StepEnded
from tracehaul.rpc.base import Service
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.offload import Offload


class Router:
    """A router whose text may come later: nodes can join before it has read its tokenizer."""

    def __init__(
        self, peers: Peers, config: DispatchConfig, terms: Terms | None = None, prices: Prices | None = None
    ) -> None:
        self.dispatch = Dispatch(peers, config, terms, prices)
        bills = self.dispatch.bills
        bills.look = Holdings(self.dispatch.traces, self.dispatch.index, self.dispatch.members, bills).look
        self.stats: dict[str, msgspec.Struct] = {
            "router": self.dispatch.stats,
            "retention": self.dispatch.retainer.stats,
            "bills": self.dispatch.bills.stats,
            "flips": self.dispatch.flips.stats,
            "adapt": self.dispatch.adapting.stats,
        }
        """Counts of its life, by the part of it that counts."""
        self.journal: Journal | None = None
        self._handover: Handover | None = None
        self._records: Records | None = None
        self._peers = peers
        self._doorway = Doorway(self.dispatch.members)

    @property
    def service(self) -> Service:
        """Serves the nodes that join, and other routers."""
        return self._doorway

    async def remember(
        self, records: Records, keep_s: float, editions: Mapping[str, str], offload: Offload, shared_as: str = ""
    ) -> None:
        """Know the traces again that were written down, and write down what becomes of them; once, and before clients
        come. The arguments are those of :class:`router.dispatch.journal.Journal`; ``shared_as``: this router's name
        where others have rows beside its own."""
        dispatch, shared, self._records = self.dispatch, bool(shared_as), records
        journal = self.journal = Journal(
            records, dispatch.traces, self._revived, keep_s, editions, offload, shared=shared
        )
        self.stats["journal"] = journal.stats
        dispatch.retainer.changed = journal.changed
        dispatch.book.written = journal
        dispatch.bills.mine = journal.writes
        if shared:
            handover = self._handover = Handover(shared_as, records, journal, self._peers, offload)
            self.stats["handover"] = handover.stats
            dispatch.adapting.leads = handover.leads
            dispatch.book.elsewhere = self._doorway.handover = handover
            await handover.start()
        await journal.start()

    def _revived(self, event: Event) -> None:
        """Something has to happen to a trace that lives on. What its lost steps have taken is told by workers yet."""
        if isinstance(event, StepEnded):
            self.dispatch.bills.adopted(event.step, event.key, clock.now_s())
        self.dispatch.retainer.send(event)

    def app(
        self,
        texts: Mapping[str, Text],
        config: ApiConfig,
        offload: Offload,
        metrics: Callable[[], bytes],
        dice: random.Random = UNFORESEEN,
        keyring: Keyring | None = None,
        jobs: Jobs | None = None,
        chats: Chats | None = None,
        outbox: Outbox | None = None,
        outliving: Outliving | None = None,
    ) -> ASGIApp:
        """Serves clients; the arguments are those of :func:`router.http.app.create_app`."""
        given: dict[str, Any] = {"jobs": jobs, "chats": chats, "outbox": outbox, "outliving": outliving}
        if (handover := self._handover) is not None:
            given["others"] = Others(lambda: handover.others, self._peers)
        app = create_app(self.dispatch, texts, metrics, config, offload, dice, keyring=keyring, **given)
        self._doorway.answer = partial(answered, app)
        return app

    async def close(self) -> None:
        """Stop following the stores, and do nothing more for traces."""
        await self.dispatch.close()
        if self.journal is not None:
            await self.journal.close()
        if self._handover is not None:
            await self._handover.close()
        if self._records is not None:
            await self._records.close()
