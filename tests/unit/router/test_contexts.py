"""What steps leave, and what prompts continue of it."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from router.traces.contexts import LEAVES_MAX, cut, grow, joined, listed
from tests.unit.router.test_traces import BLOCK, ROOT, left
from tracehaul.wire.hashing import chain, pack_tokens
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.naming import SGLANG, Naming

NAMING = Naming(ROOT, BLOCK)


@given(st.lists(st.integers(0, 2)), st.lists(st.lists(st.integers(0, 2)), max_size=4))
def test_a_prompt_is_cut_as_if_nothing_were_known(prompt: list[int], before: list[list[int]]) -> None:
    packed = pack_tokens(prompt)
    found = cut(NAMING, packed, [left(tokens, str(at)) for at, tokens in enumerate(before)])
    assert list(found.hashes) == chain(ROOT, packed, BLOCK)
    shared = [
        next((i for i, (a, b) in enumerate(zip(prompt, tokens, strict=False)) if a != b), min(len(prompt), len(tokens)))
        for tokens in before
    ]
    assert found.shared_tokens == max(shared, default=0)
    if found.left is not None:
        assert int(found.left.step) == max(i for i, n in enumerate(shared) if n == found.shared_tokens)


@given(
    st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.sampled_from(["", SGLANG]), st.sampled_from(["", "t"])
)
def test_a_prompt_that_goes_on_is_cut_as_if_it_did_not(
    before: list[int], prompt: list[int], hashing: str, salt: str
) -> None:
    naming = Naming(ROOT, BLOCK, hashing, salt)
    hashes = joined(naming.names(pack_tokens(before)))
    known = msgspec.structs.replace(left(before, root=naming.tenant), hashes=hashes)
    found = cut(naming, pack_tokens(prompt), [known])
    assert list(found.hashes) == naming.names(pack_tokens(prompt))


def test_blocks_that_nobody_here_can_name_are_not_named() -> None:
    later = Naming(ROOT, BLOCK, "later/1")
    assert not later.known
    found = cut(later, pack_tokens([1, 2, 3, 4, 5]), [left([1, 2, 3], root=later.tenant)])
    assert (list(found.hashes), found.shared_tokens) == ([], 3)


def test_contexts_of_another_model_or_tenant_are_not_continued() -> None:
    assert cut(NAMING, pack_tokens([1, 2, 3, 4]), [left([1, 2, 3, 4], root=BlockHash(b"x" * 16))]).left is None


def test_a_context_takes_the_place_of_what_it_continues() -> None:
    one, two = left([1, 2]), left([1, 9])
    assert grow([one, two], left([1, 2, 3])) == (two, left([1, 2, 3]))
    many = [left([n]) for n in range(LEAVES_MAX)]
    assert grow(many, left([99])) == (*many[1:], left([99]))


@given(st.lists(st.binary(min_size=16, max_size=16)))
def test_hashes_are_joined_and_listed(hashes: list[bytes]) -> None:
    assert listed(joined(map(BlockHash, hashes))) == hashes
