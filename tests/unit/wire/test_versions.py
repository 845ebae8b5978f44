"""Processes of one major version understand each other: what one does not know of the other's it leaves unread."""

from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import pytest

from tracehaul.rpc.frames import FrameReader, Hello, Item, Open, pack
from tracehaul.wire.cluster import Heartbeat, Join, Members, MembersChanged, NodeInfo, NodeLoad
from tracehaul.wire.errors import Fenced, JoinRefused, NameTaken, WrongCluster, WrongPool, WrongVersion, error_from_code
from tracehaul.wire.ids import Epoch, Generation, NodeId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.version import OLDEST, WIRE, Version, understands

INFO = NodeInfo(NodeId("decode-0"), Generation(2**53 - 1), "decode", "10.0.0.1:7001", epoch=Epoch(3), host="b")
LOAD = NodeLoad(running=2, serving=False, fault="no store answers")


def structs(kind: msgspec.inspect.Type, seen: set[type]) -> Iterator[msgspec.inspect.StructType]:
    """Every struct in it, however deep."""
    if isinstance(kind, msgspec.inspect.StructType):
        if kind.cls in seen:
            return
        seen.add(kind.cls)
        yield kind
        for field in kind.fields:
            yield from structs(field.type, seen)
    for name in ("types", "item_types"):
        for inner in getattr(kind, name, ()):
            yield from structs(inner, seen)
    for name in ("item_type", "key_type", "value_type"):
        if (inner := getattr(kind, name, None)) is not None:
            yield from structs(inner, seen)


def test_no_message_refuses_a_field_that_it_does_not_know() -> None:
    seen: set[type] = set()
    for message in (*get_args(Request), *get_args(Reply)):
        for kind in structs(msgspec.inspect.type_info(message), seen):
            assert not kind.forbid_unknown_fields, kind.cls
    assert {Join, NodeInfo, NodeLoad, Members, MembersChanged, Heartbeat} <= seen


def grown(value: Any) -> Any:
    """As a later minor version may send it: with a field more in every map, and one more at the end of each frame."""
    if isinstance(value, dict):
        return {**{key: grown(inner) for key, inner in value.items()}, "added_later": [1, {"x": 2}]}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list):
        return [grown(inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    return value


@pytest.mark.parametrize(
    "frame",
    [
        Open(1, Join(INFO, LOAD, "ours", WIRE)),
        Open(1, Heartbeat(INFO.node, INFO.generation, LOAD)),
        Item(1, Members(7, (INFO,), (INFO.node,), Epoch(3), 2.5)),
        Item(1, MembersChanged(8, (INFO,), (NodeId("store-0"),))),
    ],
)
def test_a_message_with_added_fields_is_read_as_the_one_without(frame: Open | Item) -> None:
    body = msgspec.msgpack.encode([*grown(msgspec.msgpack.decode(pack(frame)[4:])), "added later"])
    reader = FrameReader()
    reader.feed(pack(Hello()))
    assert reader.feed(len(body).to_bytes(4, "big") + body) == [frame]


def test_a_node_that_says_less_is_read_with_defaults() -> None:
    least = {"type": "Join", "info": {"node": "s", "generation": 1, "role": "store", "address": "s:1"}}
    join = msgspec.msgpack.decode(msgspec.msgpack.encode(least), type=Request)
    assert join == Join(NodeInfo(NodeId("s"), Generation(1), "store", "s:1"), NodeLoad(), "", OLDEST)
    assert NodeLoad().serving


def test_what_is_so_by_default_is_not_sent() -> None:
    beat = msgspec.msgpack.encode(Heartbeat(INFO.node, INFO.generation, NodeLoad()))
    assert len(beat) < 70
    assert msgspec.msgpack.decode(beat, type=Request) == Heartbeat(INFO.node, INFO.generation, NodeLoad())


@pytest.mark.parametrize(
    ("theirs", "is_understood"),
    [(WIRE, True), (WIRE._replace(minor=99), True), (Version(WIRE.major + 1, 0), False), (OLDEST, False)],
)
def test_versions_of_one_major_number_go_together(theirs: Version, is_understood: bool) -> None:
    assert understands(WIRE, theirs) == understands(theirs, WIRE) == is_understood


@pytest.mark.parametrize("error", [JoinRefused, WrongPool, WrongCluster, WrongVersion, NameTaken, Fenced])
def test_what_a_router_says_to_who_may_not_join_arrives_as_it_was(error: type[JoinRefused | Fenced]) -> None:
    assert type(error_from_code(error.code, "why")) is error
    assert issubclass(error, JoinRefused) != (error is Fenced)
