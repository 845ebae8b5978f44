"""The NIXL transport's bookkeeping, over an agent that does what the test says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from tracehaul.transfer import exchange as exchange_module
from tracehaul.transfer import lanes, notes
from tracehaul.transfer.base import Copy
from tracehaul.transfer.devices import rdma_devices
from tracehaul.transfer.exchange import GRACE_S, PROBE_S, Exchange, NameTaken, Waking
from tracehaul.transfer.lanes import Movement, Way
from tracehaul.transfer.nixl import best_pull, harmful_setting
from tracehaul.transfer.notes import Note, Probe, PullDone, PullFailed, PullRequest, Triples
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError, TransferLost


class FakeAgent:
    """Remembers what it was told; handles end when the test ends them."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.known: dict[str, bytes] = {}
        self.posted: dict[int, tuple[str, str, list[list[int]], list[list[int]], bytes]] = {}
        self.ended: dict[int, TransferError | None] = {}
        self.released: list[int] = []
        self.sent: list[tuple[str, Note]] = []
        self.inbox: list[tuple[str, bytes]] = []
        self.dead: set[str] = set()
        self.closed = False
        self.handles = 0

    @property
    def wake_fds(self) -> Sequence[int]:
        return ()

    def register(self, address: int, nbytes: int) -> bytes:
        return b"metadata of us"

    def arm(self) -> Waking:
        return "unknown"

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Two blobs are of one agent if they agree up to the first slash."""
        known = self.known.setdefault(name, metadata)
        if known.split(b"/")[0] != metadata.split(b"/")[0]:
            raise NameTaken(name)
        self.peers.append(name)

    def remove_peer(self, name: str) -> None:
        self.known.pop(name, None)
        self.peers = [peer for peer in self.peers if peer != name]

    def post(self, way: Literal["read", "write"], peer: str, ours: Triples, theirs: Triples, note: bytes) -> int:
        self._reach(peer)
        self.handles += 1
        self.posted[self.handles] = (way, peer, ours.tolist(), theirs.tolist(), note)
        return self.handles

    def poll(self, handle: int) -> bool:
        if handle not in self.ended:
            return False
        error = self.ended[handle]
        if error is not None:
            raise error
        return True

    def release(self, handle: int) -> None:
        self.released.append(handle)

    def notify(self, peer: str, note: bytes) -> None:
        self._reach(peer)
        self.sent.append((peer, notes.unpack_note(note)))

    def heard(self) -> list[tuple[str, bytes]]:
        heard, self.inbox = self.inbox, []
        return heard

    def close(self) -> None:
        self.closed = True

    def _reach(self, peer: str) -> None:
        assert peer in self.peers, f"{peer} was not made known"
        if peer in self.dead:
            raise TransferLost("dead")


THEIRS = notes.make_payload(b"metadata of peer", 3, 1_000_000, 1 << 30)


class Bench:
    """An exchange over a fake agent, with one region of ours at address 5000."""

    def __init__(self) -> None:
        self.agent = FakeAgent()
        self.exchange = Exchange(self.agent)
        self.ours = self.exchange.register(5000, 1 << 30)
        self.results: list[TransferError | None] = []

    def start(self, way: Way, copies: list[Copy], peer: str = "peer#1", now_s: float = 0.0) -> Movement:
        movement = Movement(way, peer, THEIRS, self.ours, copies, self.results.append)
        self.exchange.start(movement, now_s)
        return movement

    def hear(self, note: Note | bytes, peer: str = "peer#1", now_s: float = 0.0) -> None:
        self.agent.inbox.append((peer, note if isinstance(note, bytes) else notes.pack(note)))
        self.exchange.step(now_s)


def request(id: int = 1, ranges: bytes | None = None, region: int = 0) -> PullRequest:
    return PullRequest(id, region, THEIRS, notes.pack_ranges([Copy(10, 20, 30)]) if ranges is None else ranges)


def test_one_sided_ways_post_addresses_and_end_with_their_handle() -> None:
    bench = Bench()
    bench.start("read", [Copy(1, 2, 3), Copy(10, 20, 0), Copy(4, 5, 6)])
    assert bench.agent.posted[1] == (
        "read",
        "peer#1",
        [[5001, 3, 0], [5004, 6, 0]],
        [[1_000_002, 3, 0], [1_000_005, 6, 0]],
        b"",
    )
    assert not bench.exchange.step(0.0)
    bench.agent.ended[1] = None
    assert bench.exchange.step(0.0)
    assert bench.results == [None]
    assert bench.agent.released == [1]


def test_a_pull_asks_and_ends_with_its_own_answer() -> None:
    bench = Bench()
    bench.start("pull", [Copy(1, 2, 3)])
    ((peer, note),) = bench.agent.sent
    assert isinstance(note, PullRequest)
    assert (peer, note.region, note.into) == ("peer#1", 3, bench.ours)
    assert note.ranges == notes.pack_ranges([Copy(1, 2, 3)])
    bench.hear(PullDone(note.id), peer="stranger#1")
    bench.hear(PullDone(note.id + 1))
    assert (bench.results, bench.exchange.dropped) == ([], 2)
    bench.hear(PullDone(note.id))
    assert bench.results == [None]
    bench.hear(PullDone(note.id))
    assert (bench.results, bench.exchange.dropped) == ([None], 3)


def test_a_refused_pull_fails() -> None:
    bench = Bench()
    bench.start("pull", [Copy(1, 2, 3)])
    bench.hear(PullFailed(1, "no region 3"))
    (error,) = bench.results
    assert type(error) is TransferError
    assert "no region 3" in str(error)


@pytest.mark.parametrize("way", ["read", "write", "pull"])
def test_a_transfer_of_nothing_ends_when_the_peer_has_answered(way: Way) -> None:
    bench = Bench()
    bench.start(way, [])
    ((peer, note),) = bench.agent.sent
    assert isinstance(note, PullRequest)
    assert (peer, note.into, note.ranges, bench.agent.posted) == ("peer#1", bench.ours, b"", {})
    bench.exchange.step(0.0)
    assert bench.results == []
    bench.hear(PullDone(note.id))
    assert bench.results == [None]


def test_a_transfer_of_nothing_with_the_dead_is_lost() -> None:
    bench = Bench()
    bench.agent.dead.add("peer#1")
    bench.start("pull", [])
    assert [type(result) for result in bench.results] == [TransferLost]
    assert bench.agent.peers == []


def test_who_is_asked_for_nothing_knows_the_one_who_asks() -> None:
    bench = Bench()
    bench.hear(request(id=5, ranges=b""))
    assert bench.agent.peers == ["peer#1"]
    assert (bench.agent.sent, bench.agent.posted) == ([("peer#1", PullDone(5))], {})


def test_a_large_transfer_keeps_a_window_of_chunks_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 100)
    monkeypatch.setattr(lanes, "LANE_BYTES", 200)
    bench = Bench()
    bench.start("write", [Copy(0, 0, 350)])
    assert sorted(bench.agent.posted) == [1, 2]
    bench.agent.ended[2] = None
    bench.exchange.step(0.0)
    assert sorted(bench.agent.posted) == [1, 2, 3]
    for handle in (1, 3, 4):
        assert bench.results == []
        bench.agent.ended[handle] = None
        bench.exchange.step(0.0)
    assert bench.results == [None]
    assert sum(row[1] for _, _, ours, _, _ in bench.agent.posted.values() for row in ours) == 350


def test_giving_up_starts_no_more_and_ends_when_the_rest_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 100)
    monkeypatch.setattr(lanes, "LANE_BYTES", 200)
    bench = Bench()
    movement = bench.start("write", [Copy(0, 0, 900)])
    bench.exchange.give_up(movement)
    bench.agent.ended[1] = None
    bench.exchange.step(0.0)
    assert (sorted(bench.agent.posted), bench.results) == ([1, 2], [])
    bench.agent.ended[2] = None
    bench.exchange.step(0.0)
    assert [type(result) for result in bench.results] == [TransferLost]


def test_a_pull_from_a_peer_that_died_is_lost_after_a_probe_and_a_grace() -> None:
    bench = Bench()
    bench.start("pull", [Copy(0, 0, 10)], now_s=1.0)
    bench.start("write", [Copy(0, 0, 10)], now_s=1.0)
    bench.agent.dead.add("peer#1")
    bench.exchange.step(1.0 + PROBE_S / 2)
    assert "peer#1" in bench.agent.peers
    bench.exchange.step(1.0 + PROBE_S)
    assert bench.agent.peers == []
    assert bench.results == []  # what is in the sockets may still land
    bench.exchange.step(1.0 + PROBE_S + GRACE_S)
    assert [type(result) for result in bench.results] == [TransferLost, TransferLost]


def test_probes_end_with_the_pulls() -> None:
    bench = Bench()
    bench.start("pull", [Copy(0, 0, 10)], now_s=1.0)
    for beat in range(1, 4):
        bench.exchange.step(1.0 + beat * PROBE_S * 1.01)
    assert [note for _, note in bench.agent.sent[1:]] == [Probe()] * 3
    bench.hear(PullDone(1), now_s=2.0)
    bench.exchange.step(9.0)
    assert len(bench.agent.sent) == 4


def test_serving_writes_into_the_requester_with_the_answer_behind_the_bytes() -> None:
    bench = Bench()
    bench.hear(request(id=77))
    done = notes.pack(PullDone(77))
    assert bench.agent.posted[1] == ("write", "peer#1", [[5020, 30, 0]], [[1_000_010, 30, 0]], done)
    bench.agent.ended[1] = None
    bench.exchange.step(0.0)
    assert (bench.agent.sent, bench.agent.released) == ([], [1])


@pytest.mark.parametrize(
    "bad",
    [
        request(region=9),
        request(region=9, ranges=b""),
        request(ranges=b"x" * 23),
        request(ranges=notes.pack_ranges([Copy(0, 1 << 30, 1)])),
        request(ranges=notes.pack_ranges([Copy(1 << 30, 0, 1)])),
        request(ranges=notes.pack_ranges([Copy(0, (1 << 64) - 1, 2)])),
        request(ranges=notes.pack_ranges([Copy(0, 10, (1 << 64) - 5)])),
    ],
)
def test_a_request_outside_the_regions_is_refused(bad: PullRequest) -> None:
    bench = Bench()
    bench.hear(bad)
    assert bench.agent.posted == {}
    ((_, note),) = bench.agent.sent
    assert isinstance(note, PullFailed)
    assert bench.exchange.refused == 1


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\x80\x04\x95garbage",
        notes.pack(request())[:-1],
        notes.pack(request()) + b"x",
        msgspec.msgpack.encode({"type": "delete", "id": 1}),
        msgspec.msgpack.encode({"type": "pull", "id": 1}),
        notes.pack(PullRequest(1, 0, msgspec.structs.replace(THEIRS, metadata_checksum=1), b"")),
        notes.pack(PullRequest(1, 0, msgspec.structs.replace(THEIRS, address=-5), b"")),
        notes.pack(PullRequest(1, 0, msgspec.structs.replace(THEIRS, nbytes=1 << 63), b"")),
        b"x" * (notes.NOTE_BYTES_MAX + 1),
    ],
)
def test_malformed_notifications_are_dropped_and_counted(bad: bytes) -> None:
    bench = Bench()
    bench.hear(bad)
    assert bench.exchange.dropped == 1
    assert (bench.agent.posted, bench.agent.sent) == ({}, [])


def test_a_peer_cannot_hold_more_than_its_share() -> None:
    bench = Bench()
    for id in range(exchange_module.SERVED_PER_PEER_MAX + 1):
        bench.hear(request(id))
    assert len(bench.agent.posted) == exchange_module.SERVED_PER_PEER_MAX
    assert bench.exchange.refused == 1
    bench.hear(request(1), peer="other#1")
    assert bench.agent.posted[exchange_module.SERVED_PER_PEER_MAX + 1][1] == "other#1"


def test_a_broken_connection_to_a_requester_is_made_again() -> None:
    bench = Bench()
    bench.hear(request(1))
    bench.agent.ended[1] = None
    bench.exchange.step(0.0)
    bench.agent.dead.add("peer#1")
    remove = bench.agent.remove_peer

    def revive(name: str) -> None:
        bench.agent.dead.discard(name)
        remove(name)

    bench.agent.remove_peer = revive  # type: ignore[method-assign]
    bench.hear(request(2))
    assert bench.agent.posted[2][4] == notes.pack(PullDone(2))


def test_a_small_transfer_passes_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(lanes, "LANE_BYTES", 3000)
    monkeypatch.setattr(lanes, "SHARED_CHUNK_BYTES", 100)
    monkeypatch.setattr(lanes, "SHARED_LANE_BYTES", 300)
    bench = Bench()

    def posted() -> list[int]:
        return [sum(row[1] for row in ours) for _, _, ours, _, _ in bench.agent.posted.values()]

    bench.start("write", [Copy(0, 0, 10_000)])
    bench.start("write", [Copy(7, 7, 70)])
    bench.start("write", [Copy(0, 0, 50)], peer="other#1")  # waits for nobody
    assert posted() == [1000, 1000, 1000, 50]
    for handle in (1, 2, 3):
        bench.agent.ended[handle] = None
        bench.exchange.step(0.0)
    # Now that small ones are about, little is under way, so that the next one need not wait for long.
    assert posted() == [1000, 1000, 1000, 50, 100, 70, 100, 100]
    bench.agent.ended[6] = None
    bench.exchange.step(0.0)
    assert bench.results == [None]
    bench.agent.ended |= {5: None, 7: None, 8: None, 9: None}
    bench.exchange.step(lanes.SHARED_S)
    bench.exchange.step(lanes.SHARED_S)
    assert posted()[-3:] == [1000, 1000, 1000]


def test_what_waits_for_its_turn_ends_at_once_when_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "SHARED_LANE_BYTES", 10)
    monkeypatch.setattr(lanes, "LANE_BYTES", 10)
    bench = Bench()
    bench.start("write", [Copy(0, 0, 10)])
    bench.exchange.give_up(bench.start("write", [Copy(0, 0, 20)]))
    assert [type(result) for result in bench.results] == [TransferLost]
    bench.start("write", [Copy(0, 0, 30)])
    bench.agent.ended[1] = None
    bench.exchange.step(0.0)
    assert bench.agent.posted[2][2] == [[5000, 30, 0]]


def test_what_waits_for_its_turn_is_lost_with_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "SHARED_LANE_BYTES", 10)
    monkeypatch.setattr(lanes, "LANE_BYTES", 10)
    bench = Bench()
    for _ in range(3):
        bench.start("write", [Copy(0, 0, 10)])
    bench.agent.ended[1] = TransferLost("dead")
    bench.exchange.step(1.0)
    assert [type(result) for result in bench.results] == [TransferLost] * 2
    bench.exchange.step(1.0 + GRACE_S)
    assert [type(result) for result in bench.results] == [TransferLost] * 3
    assert list(bench.agent.posted) == [1]


def test_a_request_in_the_name_of_another_is_refused_and_harms_nobody() -> None:
    bench = Bench()
    bench.hear(request(1))
    liar = PullRequest(2, 0, notes.make_payload(b"metadata of a liar", 3, 1_000_000, 1 << 30), request().ranges)
    bench.hear(liar)
    assert (list(bench.agent.posted), bench.exchange.refused) == ([1], 1)
    assert bench.agent.known == {"peer#1": b"metadata of peer"}
    bench.agent.ended[1] = None
    bench.hear(request(3))
    assert [post[4] for post in bench.agent.posted.values()] == [notes.pack(PullDone(1)), notes.pack(PullDone(3))]


def test_a_name_is_taken_from_who_only_claimed_it() -> None:
    bench = Bench()
    liar = PullRequest(1, 0, notes.make_payload(b"metadata of a liar", 3, 1_000_000, 1 << 30), request().ranges)
    bench.hear(liar)
    bench.start("write", [Copy(0, 0, 1)])  # the control plane says who peer#1 is
    assert bench.agent.known == {"peer#1": b"metadata of peer"}
    assert [post[1] for post in bench.agent.posted.values()] == ["peer#1", "peer#1"]


def test_metadata_is_loaded_once_per_version_and_peers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "PEERS_MAX", 2)
    bench = Bench()
    bench.start("write", [Copy(0, 0, 1)], peer="a#1")
    bench.start("write", [Copy(0, 0, 1)], peer="a#1")
    bench.start("write", [Copy(0, 0, 1)], peer="b#1")
    assert bench.agent.peers == ["a#1", "b#1"]
    bench.start("write", [Copy(0, 0, 1)], peer="c#1")
    assert "2 peers" in str(bench.results[0])
    bench.agent.ended.update({1: None, 2: None})
    bench.exchange.step(0.0)
    bench.start("write", [Copy(0, 0, 1)], peer="c#1")
    assert bench.agent.peers == ["b#1", "c#1"]


def test_closing_ends_everything_once() -> None:
    bench = Bench()
    bench.start("write", [Copy(0, 0, 1)])
    bench.start("pull", [Copy(0, 0, 1)])
    bench.hear(request(5))
    bench.exchange.close(TransferLost("closed"))
    assert bench.agent.closed
    assert sorted(bench.agent.released) == [1, 2]
    assert [str(result) for result in bench.results] == ["closed", "closed"]
    bench.start("write", [Copy(0, 0, 1)])
    assert len(bench.results) == 3
    with pytest.raises(TransferLost):
        bench.exchange.register(0, 1)


def test_a_payload_survives_the_wire_and_damage_is_seen() -> None:
    packed = notes.pack(THEIRS)
    good = RegionDescriptor(kind="nixl", owner="peer#1", nbytes=THEIRS.nbytes, payload=packed)
    assert notes.unpack_payload(good) == THEIRS
    for at in range(len(packed)):
        damaged = packed[:at] + bytes([packed[at] ^ 0x01]) + packed[at + 1 :]
        try:
            payload = notes.unpack_payload(msgspec.structs.replace(good, payload=damaged))
        except TransferError:
            continue
        # Numbers without a checksum may change; the agent's blob may not.
        assert payload.metadata == THEIRS.metadata


@pytest.mark.parametrize(
    ("environ", "devices", "pull"),
    [
        ({}, set(), "request"),
        ({}, {"mlx5_0"}, "read"),
        ({"UCX_TLS": "tcp"}, {"mlx5_0"}, "request"),
        ({"UCX_TLS": "rc,cuda_copy"}, {"mlx5_0"}, "read"),
        ({"UCX_TLS": "^cuda_ipc"}, {"mlx5_0"}, "read"),
        ({"UCX_NET_DEVICES": "eth0"}, {"mlx5_0"}, "request"),
        ({"UCX_NET_DEVICES": "mlx5_0:1"}, {"mlx5_0"}, "read"),
        ({"UCX_TLS": "rc"}, set(), "request"),
        ({"UCX_TLS": "^rc,dc,ib"}, {"mlx5_0"}, "read"),
        ({"UCX_TLS": "sm,self,rc_x"}, {"mlx5_0"}, "read"),
        ({"UCX_NET_DEVICES": "^mlx5_0"}, {"mlx5_0"}, "request"),
        ({"UCX_NET_DEVICES": "^mlx5_0:1"}, {"mlx5_0", "mlx5_1"}, "read"),
        ({"UCX_TLS": "tcp", "UCX_NET_DEVICES": "mlx5_0:1"}, {"mlx5_0"}, "request"),
    ],
)
def test_reads_are_one_sided_only_where_rdma_may_be_used(environ: dict[str, str], devices: set[str], pull: str) -> None:
    assert best_pull(environ, frozenset(devices)) == pull


def test_settings_that_break_nixl_are_named() -> None:
    assert harmful_setting({"UCX_TLS": "tcp", "UCX_PROTO_ENABLE": "y"}, "request") is None
    assert "UCX_PROTO_ENABLE" in (harmful_setting({"UCX_PROTO_ENABLE": "n"}, "read") or "")
    assert "UCX_TCP_PUT_ENABLE" in (harmful_setting({"UCX_TCP_PUT_ENABLE": "n"}, "request") or "")
    assert harmful_setting({"UCX_TCP_PUT_ENABLE": "n"}, "read") is None  # RDMA has writes of its own


def test_only_devices_with_an_active_port_are_offered(tmp_path: Path) -> None:
    for device, port, state in (("mlx5_0", 1, "1: DOWN"), ("mlx5_0", 2, "4: ACTIVE"), ("mlx5_1", 1, "2: INIT")):
        folder = tmp_path / device / "ports" / str(port)
        folder.mkdir(parents=True)
        (folder / "state").write_text(f"{state}\n")
    assert rdma_devices(tmp_path) == {"mlx5_0"}
    assert rdma_devices(tmp_path / "absent") == frozenset()
