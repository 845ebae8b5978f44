"""The store as a program without an engine has it: a node and a client in one process. Run by test_distributions.

Arguments: folders to import from. Prints which modules the client's import loads, what came of a block, and what is
said where an extra is missing.
"""

import sys

sys.path[:0] = sys.argv[1:]
KNOWN = frozenset(sys.modules)

import kvstore.client  # noqa: E402 - what it loads is the question

LOADED = frozenset(sys.modules) - KNOWN
EXTRAS = ("llvmlite", "nixl", "nixl_cu12", "nixl_cu13", "ucxx", "obstore")
for name in ("torch", "numba", "starlette", *EXTRAS):
    sys.modules[name] = None  # type: ignore[assignment] # whoever imports it now fails

import asyncio  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
from typing import Any  # noqa: E402

from kvstore.client import OutgoingBlock, Staging, StoreClient  # noqa: E402
from kvstore.config import StoreConfig  # noqa: E402
from kvstore.node.assemble import assemble_store  # noqa: E402
from tracehaul.rpc.peers import Peers  # noqa: E402
from tracehaul.rpc.tcp import TcpNetwork  # noqa: E402
from tracehaul.runtime.offload import ThreadOffload  # noqa: E402
from tracehaul.transfer.memory import allocate  # noqa: E402
from tracehaul.transfer.plane import Plane  # noqa: E402
from tracehaul.transfer.shm import ShmTransfer  # noqa: E402
from tracehaul.transfer.tcp import TcpTransfer  # noqa: E402
from tracehaul.wire.cluster import NodeInfo  # noqa: E402
from tracehaul.wire.errors import TransferError  # noqa: E402
from tracehaul.wire.ids import BlockHash, Generation, NodeId  # noqa: E402

NBYTES = 1 << 20
ROOT, BLOCK = BlockHash(b"r" * 16), BlockHash(b"b" * 16)


async def there_and_back(kind: str, offload: ThreadOffload) -> list[Any]:
    """Outcome of a put, size of the same block got, and whether it has the same bytes."""

    def plane(owner: str) -> tuple[Plane, Any]:
        memory = allocate(4 * NBYTES, owner)
        transfer = ShmTransfer(owner, offload) if kind == "shm" else TcpTransfer(owner)
        return Plane(transfer, transfer.register(memory)), memory

    served, arena = plane("store-0#1")
    node = assemble_store(StoreConfig(4 * NBYTES, NBYTES), Generation(1), [served], arena, offload)
    server = await TcpNetwork().listen("127.0.0.1:0", node)
    peers = Peers(TcpNetwork())
    own, memory = plane("client#1")
    client = StoreClient(peers, [own], Staging(memory, NBYTES), offload)
    client.set_nodes([NodeInfo(NodeId("store-0"), Generation(1), "store", server.address)])
    out, back = await client.staging.acquire(2, 5.0)
    out.view(NBYTES)[:] = bytes(range(256)) * (NBYTES // 256)
    outcomes = await client.put(NodeId("store-0"), [OutgoingBlock(BLOCK, ROOT, out, NBYTES)], 5.0)
    sizes = await client.get([BLOCK], [back], 5.0)
    same = back.view(NBYTES) == out.view(NBYTES)
    await client.aclose()
    await peers.close()
    await server.close()
    await node.aclose()
    return [*outcomes, *sizes, same]


def missing(extra: str) -> str:
    """What is said to who asks for it."""
    try:
        match extra:
            case "nixl":
                from tracehaul.transfer.nixl import NixlTransfer

                NixlTransfer("client#1")
            case "ucxx":
                from tracehaul.transfer.ucxx import UcxxTransfer

                UcxxTransfer("client#1")
            case _:
                importlib.import_module("kvstore.tiers.s3")
    except (TransferError, ImportError) as error:
        return str(error)
    return "it is there"


async def main() -> None:
    offload = ThreadOffload("test", 2)
    told = {kind: await there_and_back(kind, offload) for kind in ("shm", "tcp")}
    offload.close()
    errors = {extra: missing(extra) for extra in ("nixl", "ucxx", "s3")}
    json.dump({"loaded": sorted(LOADED), "from": kvstore.client.__file__, "blocks": told, "errors": errors}, sys.stdout)


asyncio.run(main())
