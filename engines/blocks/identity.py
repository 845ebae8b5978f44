"""What a pool's blocks are, written down in the store, so that who brings others learns it at its start. Pure.

Roots keep two layouts apart by themselves. But a server that is not what its operator meant would then compute all
anew, silently: so the first server of a pool leaves a record, and one that differs is refused in one line.
"""

import msgspec
from blake3 import blake3

from tracehaul.wire.hashing import HASH_BYTES, KVLayout
from tracehaul.wire.ids import BlockHash

RECORD_BYTES = 4096
"""What any store's slot takes."""
_FORM = 1
_NAMESPACE = b"tracehaul/pool|"
"""No layout's root begins with that, so no block is chained to it."""

RECORD_PARENT = BlockHash(blake3(b"tracehaul/pools").digest(HASH_BYTES))


class _Record(msgspec.Struct, frozen=True):
    form: int
    layout: dict[str, str | int]


def record_hash(pool: str) -> BlockHash:
    """Where a pool's record is."""
    return BlockHash(blake3(_NAMESPACE + pool.encode()).digest(HASH_BYTES))


def record_of(layout: KVLayout) -> bytes:
    """What a server of this layout leaves, whatever its rank."""
    said = msgspec.json.encode(_Record(_FORM, _said(layout)))
    assert len(said) <= RECORD_BYTES, "a name of a model is short"
    return said.ljust(RECORD_BYTES)


def difference(record: bytes, layout: KVLayout, pool: str) -> str | None:
    """Why a server of that layout cannot use the pool with that record; None: it can."""
    called = f"pool {pool!r}" if pool else "the pool that has no name"
    advice = "start it as those there, or give it a pool of its own"
    try:
        there = msgspec.json.decode(record, type=_Record)
    except msgspec.DecodeError:
        return f"what {called} holds cannot be read: {advice}"
    if there.form != _FORM:
        return f"{called} is of form {there.form}, this server writes {_FORM}: {advice}"
    ours = _said(layout)
    keys = [
        key for key in (*ours, *(k for k in there.layout if k not in ours)) if ours.get(key) != there.layout.get(key)
    ]
    if not keys:
        return None
    told = ", ".join(f"{key} {there.layout.get(key)!r} and not {ours.get(key)!r}" for key in keys)
    return f"{called} holds KV with {told}: {advice}"


def _said(layout: KVLayout) -> dict[str, str | int]:
    said = msgspec.structs.asdict(layout)
    said["shard"] = sizes_of(layout.shard)
    return said


def shard(tp_rank: int, tp_size: int, pp_rank: int, pp_size: int, *, replicated: bool) -> str:
    """Which part of a model's KV a rank has. ``replicated``: all ranks of tensor parallelism have the same (MLA), one
    writes it, and how many there are does not matter."""
    heads = "0/1" if replicated else f"{tp_rank}/{tp_size}"
    return heads if pp_size == 1 else f"{heads}.{pp_rank}/{pp_size}"


def sizes_of(shard: str) -> str:
    """How a model is cut, of one part's name."""
    return ".".join(part.partition("/")[2] for part in shard.split("."))
