import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracehaul.rpc.frames import (
    FRAME_BYTES_MAX,
    Alive,
    Call,
    Cancel,
    End,
    Fail,
    Frame,
    FrameReader,
    Hello,
    Item,
    Open,
    Reply,
    check_hello,
    pack,
)
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import Existing, Exists, Subscribe
from tracehaul.wire.errors import ProtocolError
from tracehaul.wire.ids import BlockHash, StepId, TraceId
from tracehaul.wire.steps import PrefillProgress

ids = st.integers(1, 2**63 - 1)
requests = st.one_of(
    st.just(Ping()),
    st.just(Subscribe()),
    st.lists(st.binary(max_size=40).map(BlockHash), max_size=5).map(lambda hashes: Exists(tuple(hashes))),
)
replies = st.one_of(st.just(Ok()), st.binary(max_size=200).map(Existing), st.integers(0, 2**40).map(PrefillProgress))
traces = st.none() | st.text(max_size=10).map(TraceId)
steps = st.none() | st.text(max_size=10).map(StepId)
later_frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(Call, ids, requests, st.floats(0, 86_400, exclude_min=True), traces, steps),
    st.builds(Open, ids, requests, traces, steps),
    st.builds(Reply, ids, replies),
    st.builds(Item, ids, replies),
    st.builds(End, ids),
    st.builds(Fail, ids, st.text(max_size=20), st.text(max_size=100)),
    st.builds(Cancel, ids),
    st.builds(Alive, st.lists(ids, max_size=5).map(tuple)),
)


@given(st.lists(later_frames, max_size=8), st.lists(st.integers(0, 3000), max_size=20))
def test_any_splitting_gives_the_same_frames(frames: list[Frame], cuts: list[int]) -> None:
    frames = [Hello(), *frames]
    data = b"".join(pack(frame) for frame in frames)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reader = FrameReader()
    received: list[Frame] = []
    for start, end in itertools.pairwise(edges):
        received += reader.feed(data[start:end])
    assert received == frames


def test_one_byte_at_a_time() -> None:
    reader = FrameReader()
    data = pack(Hello()) + pack(Cancel(7))
    assert [frame for byte in data for frame in reader.feed(bytes([byte]))] == [Hello(), Cancel(7)]


@given(st.lists(st.binary(max_size=300), max_size=5), st.booleans())
def test_garbage_is_frames_or_a_protocol_error(chunks: list[bytes], framed: bool) -> None:
    reader = FrameReader(frame_bytes_max=1000)
    reader.feed(pack(Hello()))
    try:
        for chunk in chunks:
            reader.feed(struct.pack(">I", len(chunk)) + chunk if framed else chunk)
    except ProtocolError:
        pass


@given(later_frames, st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_frame_is_another_frame_or_a_protocol_error(frame: Frame, where: int, value: int) -> None:
    data = bytearray(pack(frame))
    data[where % len(data)] = value
    reader = FrameReader(frame_bytes_max=1000)
    reader.feed(pack(Hello()))
    try:
        for received in reader.feed(data):
            assert isinstance(received, Frame)
    except ProtocolError:
        pass


def test_a_hostile_length_is_refused_from_its_four_bytes() -> None:
    reader = FrameReader()
    reader.feed(pack(Hello()))
    with pytest.raises(ProtocolError, match="limit"):
        reader.feed(struct.pack(">I", FRAME_BYTES_MAX + 1))


def test_before_hello_little_is_taken() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        FrameReader().feed(struct.pack(">I", 1000))


def test_a_hostile_array_length_is_refused_without_memory() -> None:
    body = b"\x92\x08\xdd\xff\xff\xff\xff"  # Alive with 2**32 - 1 ids
    reader = FrameReader()
    reader.feed(pack(Hello()))
    with pytest.raises(ProtocolError, match="malformed"):
        reader.feed(struct.pack(">I", len(body)) + body)


def test_an_oversize_frame_is_not_packed() -> None:
    frame = Call(1, Exists((BlockHash(bytes(200)),)), 1.0)
    with pytest.raises(ProtocolError, match="Call"):
        pack(frame, frame_bytes_max=200)
    pack(frame, frame_bytes_max=300)


def test_hello_is_checked() -> None:
    check_hello(Hello())
    with pytest.raises(ProtocolError, match="version 2"):
        check_hello(Hello(version=2))
    with pytest.raises(ProtocolError, match="does not speak"):
        check_hello(Hello(magic="kafka"))
    with pytest.raises(ProtocolError, match="does not speak"):
        check_hello(Cancel(1))
