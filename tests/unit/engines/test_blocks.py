"""What blocks are and how they are called, where no store is needed."""

import asyncio
from collections.abc import AsyncGenerator

import msgspec
import pytest
from blake3 import blake3

from engines.blocks.identity import RECORD_BYTES, difference, record_of, shard, sizes_of
from router.fleet.gate import Gate
from tracehaul.rpc.base import NO_CONTEXT, CallContext
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import Heartbeat, NodeLoad
from tracehaul.wire.errors import Untrusted
from tracehaul.wire.hashing import KVLayout
from tracehaul.wire.ids import Generation, NodeId
from tracehaul.wire.messages import Reply, Request

LAYOUT = KVLayout("m@r", "bfloat16", 2, 3, 4, 2, 4)


def test_a_layout_that_says_nothing_new_has_the_root_that_it_had():
    said = (
        b'{"model":"m@r","dtype":"bfloat16","layers":2,"kv_heads":3,"head_dim":4,"element_bytes":2,'
        b'"block_tokens":4,"shard":"0/1"}'
    )
    assert LAYOUT.root() == blake3(b"tracehaul/1|" + said).digest(16)
    assert msgspec.json.decode(said, type=KVLayout) == LAYOUT, "what an older peer says is understood"


@pytest.mark.parametrize("field", ["order", "hashing", "scales"])
def test_each_new_field_makes_another_root(field: str):
    assert msgspec.structs.replace(LAYOUT, **{field: "x"}).root() != LAYOUT.root()


def test_a_record_is_of_a_cut_and_not_of_a_rank():
    ours, other = (msgspec.structs.replace(LAYOUT, shard=shard(r, 2, 0, 1, replicated=False)) for r in (0, 1))
    assert len(record_of(ours)) == RECORD_BYTES
    assert difference(record_of(ours), other, "") is None
    assert "holds KV with shard '2' and not '1'" in str(difference(record_of(ours), LAYOUT, "p"))
    assert shard(3, 4, 1, 2, replicated=True) == "0/1.1/2", "one writer, however many ranks"
    assert sizes_of("3/4.1/2") == "4.2"


def test_a_record_of_another_form_is_refused():
    corrupted = record_of(LAYOUT).replace(b'"form":1', b'"form":7')
    assert "of form 7" in str(difference(corrupted, LAYOUT, ""))
    assert "cannot be read" in str(difference(b"\x00" * RECORD_BYTES, LAYOUT, ""))


class _Anybody:
    async def call(self, request: Request, context: CallContext) -> Reply:
        return Ok()

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        yield Ok()

    def disconnected(self, peer: str) -> None: ...


def test_a_nodes_engine_joins_by_the_nodes_certificate_and_no_other():
    context = msgspec.structs.replace(NO_CONTEXT, names=frozenset({"decode-0"}))

    def beat(name: str) -> Reply:
        return asyncio.run(Gate(_Anybody()).call(Heartbeat(NodeId(name), Generation(1), NodeLoad()), context))

    assert beat("decode-0+engine") == Ok()
    for name in ("decode-1+engine", "+engine", "decode-0-engine"):
        with pytest.raises(Untrusted):
            beat(name)
