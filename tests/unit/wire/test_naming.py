"""What blocks are called, of our engine's and of SGLang's."""

import hashlib

import msgspec

from tracehaul.wire.hashing import KVLayout, chain, named, pack_tokens
from tracehaul.wire.naming import SGLANG, Naming

LAYOUT = KVLayout("m@r", "bfloat16", 2, 3, 4, 2, 4)
THEIRS = msgspec.structs.replace(LAYOUT, hashing=SGLANG)
TOKENS = pack_tokens(list(range(11)))


def test_blocks_are_found_by_who_computed_none():
    assert Naming.of(LAYOUT, "t").names(TOKENS) == chain(LAYOUT.root("t"), TOKENS, 4)
    first = hashlib.sha256(TOKENS[:16]).digest()
    second = hashlib.sha256(first + TOKENS[16:32]).digest()
    assert Naming.of(THEIRS).names(TOKENS) == [named(THEIRS.root(), first), named(THEIRS.root(), second)]
    assert not set(Naming.of(THEIRS, "t").names(TOKENS)) & set(Naming.of(THEIRS).names(TOKENS))


def test_a_tenants_names_are_nobody_elses():
    for layout in (LAYOUT, THEIRS):
        assert len({Naming.of(layout, salt).tenant for salt in ("", "t", "u")}) == 3
    assert Naming.of(LAYOUT, "t").tenant == LAYOUT.root("t")
