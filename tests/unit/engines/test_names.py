"""Blocks of other engines under the names that these give them."""

import hashlib

import msgspec
from blake3 import blake3

from engines.adapter.names import SCHEMES, Shared, names
from tracehaul.engine.fake import FAKE_LAYOUT
from tracehaul.wire.hashing import chain, pack_tokens

ROOT = FAKE_LAYOUT.root()
PACKED = pack_tokens(range(20))


def shared(hashing: str) -> Shared:
    return Shared(ROOT.hex(), 8, hashing)


def test_ours_are_the_chain_of_their_salted_root() -> None:
    for salt in ("", "tenant"):
        assert names(shared(""), PACKED, salt) == chain(FAKE_LAYOUT.root(salt), PACKED, 8)


def test_sglangs_follow_its_pages() -> None:
    first = hashlib.sha256(PACKED[:32]).digest()
    second = hashlib.sha256(first + PACKED[32:64]).digest()
    wanted = [blake3(ROOT + b"/" + key).digest(16) for key in (first, second)]
    assert names(shared("sglang/sha256"), PACKED, "") == wanted
    # extra_key is absent, cache_salt is there.
    seed = hashlib.sha256(b"sglang-cache-namespace-v1")
    seed.update(b"\x00")
    seed.update(b"\x01" + (4).to_bytes(8, "little") + b"acme")
    salted = hashlib.sha256(seed.digest() + PACKED[:32]).digest()
    assert names(shared("sglang/sha256"), PACKED, "acme")[0] == blake3(ROOT + b"/" + salted).digest(16)


def test_every_scheme_names_full_blocks_alone_and_keeps_tenants_and_roots_apart() -> None:
    for hashing in SCHEMES:
        found = names(shared(hashing), PACKED, "")
        assert len(found) == 2
        assert names(shared(hashing), PACKED[:64], "") == found
        assert names(shared(hashing), PACKED[:60], "") == found[:1]
        assert not set(found) & set(names(shared(hashing), PACKED, "tenant"))
        assert not set(found) & set(names(Shared(b"x".hex() * 16, 8, hashing), PACKED, ""))
        assert names(shared(hashing), b"", "") == []


def test_what_a_plugin_writes_is_read() -> None:
    said = {"root": ROOT.hex(), "block_tokens": 32, "hashing": "sglang/sha256"}
    assert msgspec.json.decode(msgspec.json.encode(said), type=Shared).root_hash == ROOT
