"""The workers of one role as columns of figures, so that placing a step among a thousand is a few vector operations.

Pure. The router enters what it sends and what comes back, since heartbeats are a second old: a worker's queue is what
was sent there and has not answered, in seconds at its own rates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracehaul.wire.cluster import NodeInfo, NodeLoad, Rates
from tracehaul.wire.ids import Generation, NodeId

Column = NDArray[np.float64]

FIGURES = 10
_SENT = 5


class Key(NamedTuple):
    """One life of one worker."""

    node: NodeId
    generation: Generation


class Row(NamedTuple):
    """One worker as a table had it, to be written down."""

    key: Key
    figures: tuple[float, ...]
    """What it said of itself."""
    running: int
    decoding: int
    work_s: float
    until_s: float
    tokens: float = 0.0


OVERDUE_SHARE = 0.3
"""Of the work under way somewhere, what is expected still to be done when it should have been done by now."""


@dataclass
class _Account:
    """What the router has sent to one worker and not seen the end of."""

    running: int = 0
    decoding: int = 0
    """Of those, steps whose first token has come."""
    work_s: float = 0.0
    """Prompts that are still computed, by estimate."""
    until_s: float = 0.0
    """When they should be done, one after the other."""
    tokens: float = 0.0
    """Contexts of all of them."""


@dataclass(frozen=True)
class Warm:
    """The decode worker that ran a step, in one life of it, and how many tokens it kept."""

    node: NodeId
    generation: Generation
    retained_tokens: int


class WorkerTable:
    """Rows are workers, in the order of the last :meth:`sync`; what was sent to them outlives it."""

    def __init__(self) -> None:
        self._infos: Sequence[NodeInfo] = ()
        self._loads: Sequence[NodeLoad] = ()
        self._accounts: dict[Key, _Account] = {}
        self.keys: list[Key] = []
        self.rows: dict[Key, int] = {}
        self._columns = np.zeros((FIGURES, 0))
        self._sent = np.zeros((_SENT, 0))

    def __len__(self) -> int:
        """Workers."""
        return len(self.keys)

    def sync(self, infos: Sequence[NodeInfo], loads: Sequence[NodeLoad]) -> None:
        """These workers can be chosen now, with what they said last."""
        if len(infos) != len(self._infos) or any(a is not b for a, b in zip(infos, self._infos, strict=True)):
            self._infos, self._loads = list(infos), list(loads)
            self.keys = [Key(info.node, info.generation) for info in infos]
            self.rows = {key: row for row, key in enumerate(self.keys)}
            figures = [_figures(info, load) for info, load in zip(infos, loads, strict=True)]
            self._columns = np.array(figures, dtype=np.float64).reshape(-1, FIGURES).T.copy()
            self._sent = np.zeros((_SENT, len(infos)))
            for row, key in enumerate(self.keys):
                self._write(row, self._accounts.get(key))
            return
        for row, load in enumerate(loads):
            if load is not self._loads[row]:
                self._columns[:, row] = _figures(infos[row], load)
        self._loads = list(loads)

    def written(self, rows: Iterable[int]) -> list[Row]:
        """Those rows, to be read by :meth:`read`."""
        found: list[Row] = []
        for row in rows:
            running, decoding, work_s, until_s, tokens = self._sent[:, row].tolist()
            figures = tuple(float(f"{figure:.6g}") for figure in self._columns[:, row])
            found.append(Row(self.keys[row], figures, int(running), int(decoding), work_s, until_s, tokens))
        return found

    @staticmethod
    def read(rows: Sequence[Row]) -> "WorkerTable":
        """A table of these."""
        table = WorkerTable()
        table.keys = [row.key for row in rows]
        table.rows = {key: number for number, key in enumerate(table.keys)}
        table._columns = np.array([row.figures for row in rows], dtype=np.float64).reshape(-1, FIGURES).T.copy()
        table._sent = np.zeros((_SENT, len(rows)))
        for number, row in enumerate(rows):
            account = _Account(row.running, row.decoding, row.work_s, row.until_s, row.tokens)
            table._accounts[row.key] = account
            table._write(number, account)
        return table

    def sent(self, key: Key, work_s: float, now_s: float, tokens: float = 0.0) -> None:
        """A step was sent there, whose prompt takes so long, and has so many tokens."""
        account = self._accounts.setdefault(key, _Account())
        account.running += 1
        account.tokens += tokens
        account.work_s += work_s
        account.until_s = max(now_s, account.until_s) + work_s
        self._tell(key, account)

    def computed(self, key: Key, work_s: float, now_s: float) -> None:
        """A step's prompt is computed, and its first token has come."""
        account = self._accounts[key]
        account.decoding += 1
        self._less(account, work_s)
        if work_s:  # what was estimated too high or too low has shown by now: the rest starts from here
            account.until_s = now_s + account.work_s
        self._tell(key, account)

    def ended(self, key: Key, work_s: float, *, computed: bool, tokens: float = 0.0) -> None:
        """A step ended there, before its first token if not ``computed``."""
        account = self._accounts[key]
        account.running -= 1
        account.tokens -= tokens
        assert account.running >= 0
        if computed:
            account.decoding -= 1
        else:
            self._less(account, work_s)
            account.until_s -= work_s
        if account.running == 0:
            del self._accounts[key]
        self._tell(key, account)

    def running(self, key: Key) -> int:
        """Steps sent there that have not ended."""
        account = self._accounts.get(key)
        return 0 if account is None else account.running

    @property
    def total(self) -> int:
        """Steps in progress on all workers, those that cannot be chosen now too."""
        return sum(account.running for account in self._accounts.values())

    def queue_s(self, now_s: float) -> Column:
        """How long a prompt that is sent now waits for its turn."""
        _, _, work_s, until_s, _ = self._sent
        return np.minimum(work_s, np.maximum(until_s - now_s, OVERDUE_SHARE * work_s))

    @property
    def running_steps(self) -> Column:
        """Steps in progress."""
        return self._sent[0]

    @property
    def decoding(self) -> Column:
        """Steps that get tokens now."""
        return self._sent[1]

    @property
    def sent_tokens(self) -> Column:
        """Of the prompts of steps in progress."""
        return self._sent[4]

    @property
    def token_s(self) -> Column:
        """As in :class:`tracehaul.wire.cluster.Rates`, like those that follow."""
        return self._columns[0]

    @property
    def pair_s(self) -> Column:
        """Per token and token before it."""
        return self._columns[1]

    @property
    def decode_s(self) -> Column:
        """Per iteration."""
        return self._columns[2]

    @property
    def pull_token_s(self) -> Column:
        """Per token."""
        return self._columns[3]

    @property
    def free_tokens(self) -> Column:
        """KV memory with nothing in it."""
        return self._columns[4]

    @property
    def shared(self) -> Column:
        """As in :class:`tracehaul.wire.cluster.NodeLoad`."""
        return self._columns[5]

    @property
    def local_tokens(self) -> Column:
        """Missing tokens that a decode worker computes itself in any case."""
        return self._columns[6]

    @property
    def held_tokens(self) -> Column:
        """KV memory of a worker whose steps hold theirs until they end, while others wait for it; 0 where they give
        way."""
        return self._columns[8]

    @property
    def kv_tokens(self) -> Column:
        """KV memory; 0 where that is not known, or sequences share it, as in servers that schedule themselves."""
        return self._columns[9]

    def due_s(self, key: Key, work_s: float) -> float:
        """When it is the turn of a prompt there that takes so long, counted from when it came."""
        row = self.rows.get(key)
        return 0.0 if row is None else float(self._columns[7, row]) * work_s

    def _less(self, account: _Account, work_s: float) -> None:
        account.work_s = max(0.0, account.work_s - work_s) if account.running > account.decoding else 0.0

    def _tell(self, key: Key, account: _Account) -> None:
        row = self.rows.get(key)
        if row is not None:
            self._write(row, account)

    def _write(self, row: int, account: _Account | None) -> None:
        if account is not None:
            self._sent[:, row] = (
                account.running,
                account.decoding,
                account.work_s,
                account.until_s,
                account.tokens,
            )


def _figures(info: NodeInfo, load: NodeLoad) -> tuple[float, ...]:
    rates = Rates(load.token_s, load.pair_s, load.decode_s, load.pull_token_s) if load.token_s else info.rates
    limits = info.limits
    held = float(limits.kv_tokens_max) if "suspension" in info.lacks else 0.0
    own = float(limits.kv_tokens_max) if info.engine in ("", "native") else 0.0
    return *rates, float(load.free_tokens), load.shared, float(limits.local_prefill_tokens), limits.stretch, held, own
