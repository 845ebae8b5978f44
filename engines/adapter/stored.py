"""Which blocks of a sequence the store has: what a server's plugin puts there is seen from outside alone."""

import asyncio

from kvstore.client.looks import LOOK_TIMEOUT_S, Looks
from kvstore.client.nodes import StoreNodes
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.wire.cluster import Members
from tracehaul.wire.hashing import KVLayout
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.naming import Naming

BREAK_S = 1.0
"""How long a node that failed is left alone."""
POLLS_S = (0.005, 0.01, 0.02, 0.05, 0.1)
"""Pauses between looks; the last one from then on."""


class Stored:
    """Looks by block, of a server whose blocks have that layout; None: it shares none."""

    def __init__(self, peers: Peers, layout: KVLayout | None) -> None:
        self._layout = layout
        self._nodes = StoreNodes(peers, [], BREAK_S)
        self._looks = Looks(self._nodes)

    @property
    def shares(self) -> bool:
        """Whether what other servers computed is ever found here."""
        return self._layout is not None

    def set_members(self, members: Members) -> None:
        """Membership changed."""
        self._nodes.set(members.nodes, members.draining)

    def hashes(self, packed: bytes, salt: str) -> list[BlockHash]:
        """Of the full blocks of a sequence."""
        if self._layout is None:
            return []
        return Naming.of(self._layout, salt).names(packed)

    def covered(self, hashes: list[BlockHash]) -> int:
        """Tokens in so many full blocks."""
        return 0 if self._layout is None else len(hashes) * self._layout.block_tokens

    async def tokens(self, hashes: list[BlockHash]) -> int:
        """Length of the leading run of these that the stores hold; takes half a second at most."""
        if self._layout is None or not hashes or not self._nodes.live():
            return 0
        held = await self._looks.look(hashes, (), LOOK_TIMEOUT_S)
        blocks = 0
        while blocks < len(hashes) and any(blocks < len(said) and said[blocks] for said in held.values()):
            blocks += 1
        return self.covered(hashes[:blocks])

    async def wait(self, hashes: list[BlockHash], timeout_s: float) -> int:
        """As :meth:`tokens`, once they hold all of these, or after ``timeout_s``."""
        if self._layout is None or not hashes or not self._nodes.live():
            return 0
        all_tokens, until_s = self.covered(hashes), clock.now_s() + timeout_s
        looks = 0
        while True:
            # The last is there when all are, nearly always: one hash to ask for.
            last = await self._looks.look(hashes[-1:], (), LOOK_TIMEOUT_S)
            late = clock.now_s() >= until_s
            if late or any(said and said[0] for said in last.values()):
                there = await self.tokens(hashes)
                if late or there == all_tokens:
                    return there
            await asyncio.sleep(POLLS_S[min(looks, len(POLLS_S) - 1)])
            looks += 1

    async def aclose(self) -> None:
        """Give back what is held at the stores."""
        await self._looks.aclose()
        await self._nodes.aclose()
