"""Tokens in wire form, and as a sequence that grows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracehaul.wire.hashing import chain, next_hash, pack_tokens, token_array, token_count, unpack_tokens
from tracehaul.wire.ids import BlockHash

ROOT = BlockHash(bytes(16))
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(TOKENS, TOKENS)
def test_a_sequence_that_grew_has_the_bytes_of_all_its_tokens(start: list[int], more: list[int]) -> None:
    grown = token_array(pack_tokens(start))
    for token in more:
        grown.append(token)
    assert grown.tolist() == start + more
    assert grown.tobytes() == pack_tokens(grown) == pack_tokens(start + more)
    assert token_count(grown.tobytes()) == len(start) + len(more)
    assert unpack_tokens(grown.tobytes()) == start + more


def test_blocks_hash_alike_from_either_form() -> None:
    packed = pack_tokens(range(10))
    tokens = token_array(packed)
    first = next_hash(ROOT, tokens[:4].tobytes())
    assert chain(ROOT, packed, 4) == [first, next_hash(first, tokens[4:8].tobytes())]


def test_half_a_token_is_none() -> None:
    with pytest.raises(ValueError, match="multiple"):
        token_array(b"\x01\x00")
