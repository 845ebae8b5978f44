"""What the store's commands read from a command line and show."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from cluster.asking import Answers, Found, StoreRef
from cluster.prompts import Blocks, Source, blocks_of, parse_hash, parse_tokens
from cluster.rundir import ClusterFault
from cluster.store.bench import BenchResult
from cluster.store.command import Args, Command, Session, end
from cluster.store.commands import COMMANDS, app
from cluster.store.limits import Change, changes_for, parse_change
from cluster.store.tables import duration, holding, limit, ping_table, pins_table, query_table, ranges, share, size
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.wire.blocks import PinInfo, PinList
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.hashing import chain, pack_tokens, salted
from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId
from tracehaul.wire.operations import Located

ROOT = BlockHash(b"r" * 16)
S0, S1 = NodeId("store-0"), NodeId("store-1")
SESSION = Session(Args(), [], Peers(LocalNetwork()), Blocks([], 0))


def text(table: Table) -> list[str]:
    """Its lines without the blanks at their ends."""
    console = Console(file=StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, StringIO)
    return [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (720 << 10, "720.0 KiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes(nbytes: int, shown: str):
    assert size(nbytes) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(5.4, "5s"), (65, "1m05s"), (3725, "1h02m"), (90000, "1d01h")])
def test_durations(seconds: float, shown: str):
    assert duration(seconds) == shown


def test_shares_and_limits_carry_their_units():
    assert (share(1, 4), share(0, 0)) == ("25 %", "-")
    assert limit("lease_ttl_max_s", 30.0) == "30 s"
    assert limit("scrub_bytes_s", 2 << 20) == "2.0 MiB/s"
    assert limit("scrub_bytes_s", 0) == "0 (never)"
    assert limit("quota_bytes", {"b": 1024, "a": 512}) == "a: 512 B, b: 1.0 KiB"
    assert limit("quota_bytes", {}) == "none"
    assert limit("leases_max", 7) == "7"


@pytest.mark.parametrize(
    ("written", "change"),
    [
        ("leases_max=2048", Change("leases_max", None, 2048)),
        (" hard_share_max = 0.25 ", Change("hard_share_max", None, 0.25)),
        ("scrub_bytes_s=8MiB", Change("scrub_bytes_s", None, 8 << 20)),
        ("quota_bytes.a.b=1GiB", Change("quota_bytes", "a.b", 1 << 30)),
        ("quota_bytes.alice=none", Change("quota_bytes", "alice", None)),
    ],
)
def test_changes_as_they_are_written(written: str, change: Change):
    assert parse_change(written) == change


@pytest.mark.parametrize("written", ["leases_max", "=3", "leases_max=", "leases_max=many", "scrub_bytes_s=8 MiX"])
def test_what_is_no_change_is_refused(written: str):
    with pytest.raises(ClusterFault):
        parse_change(written)


def test_of_a_limit_with_entries_the_others_stay():
    limits = {"leases_max": 1, "quota_bytes": {"a": 1, "b": 2}}
    changes = [Change("quota_bytes", "a", None), Change("quota_bytes", "c", 3), Change("leases_max", None, 9)]
    assert changes_for(limits, changes) == {"quota_bytes": {"b": 2, "c": 3}, "leases_max": 9}
    assert limits["quota_bytes"] == {"a": 1, "b": 2}


def test_hashes_and_tokens_as_they_are_written():
    assert parse_hash("00" * 16) == bytes(16)
    assert parse_tokens("1, 2 3\n") == parse_tokens("[1,2,3]") == [1, 2, 3]
    for wrong in ("", "zz", "00" * 15):
        with pytest.raises(ClusterFault, match="32 hex digits"):
            parse_hash(wrong)
    for wrong in ("[1, 2", '["a"]', "1 two"):
        with pytest.raises(ClusterFault, match="not token ids"):
            parse_tokens(wrong)


def found(*workers: NodeInfo) -> Found:
    return Found([StoreRef(S0, "ready", "x:1"), StoreRef(S1, "dead")], list(workers), None, None)


def test_tokens_become_the_hashes_that_workers_use(tmp_path: Path):
    worker = NodeInfo(NodeId("decode-0"), Generation(1), "decode", "x:2", root=ROOT, block_tokens=4)
    file = tmp_path / "tokens"
    file.write_text("1 2 3 4 5 6 7 8 9")
    blocks = blocks_of(Source(tokens=file, salt="s"), found(worker))
    assert blocks.hashes == chain(salted(ROOT, "s"), pack_tokens(range(1, 10)), 4)
    assert (len(blocks.hashes), blocks.block_tokens, blocks.tokens) == (2, 4, 9)
    with pytest.raises(ClusterFault, match="no worker is ready"):
        blocks_of(Source(tokens=file), found())
    with pytest.raises(ClusterFault, match="tokenizer is where the cluster was started"):
        blocks_of(Source(prompt=file), found(worker))
    with pytest.raises(ClusterFault, match="cannot read"):
        blocks_of(Source(tokens=tmp_path / "none"), found(worker))
    file.write_text("-1")
    with pytest.raises(ClusterFault, match="not token ids"):
        blocks_of(Source(tokens=file), found(worker))


def test_blocks_are_named_in_exactly_one_way():
    for source in (Source(), Source(hashes=["00" * 16], tokens=Path("x"))):
        with pytest.raises(ClusterFault, match="say which blocks"):
            blocks_of(source, found())


def test_a_node_that_is_not_there_is_told_with_those_that_are():
    assert [ref.node for ref in found().select(None)] == [S0, S1]
    assert [ref.node for ref in found().select("store-1")] == [S1]
    with pytest.raises(ClusterFault, match="no store node store-7; there are store-0, store-1"):
        found().select("store-7")


def test_what_is_held_is_counted_by_run_and_by_tier():
    first = Located({"memory": b"\1\1\0\0\1", "disk": b"\1\0\0\0\0"})
    second = Located({"memory": b"\0\0\1\0\0"})
    assert ranges(first, 5) == [(0, 0, "memory+disk"), (1, 1, "memory"), (4, 4, "memory")]
    both = holding([first, second], 5)
    assert (both.run, both.held, both.tiers) == (3, 4, {"memory": 4, "disk": 1})
    assert holding([], 0).run == 0
    lines = text(query_table({S0: first, S1: second}, 5))
    assert lines[2].split() == ["store-0", "2", "3", "0", "memory+disk,", "1", "memory,", "4", "memory"]
    assert lines[3].split() == ["store-1", "0", "1", "2", "memory"]
    assert lines[4].split() == ["all", "nodes", "3", "4"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_explains_itself_and_its_options(command: Command):
    told = CliRunner().invoke(app, [command.name, "--help"], terminal_width=200).output
    assert " ".join(command.help.split())[:60] in " ".join(told.split())
    assert all(f"tracehaul store {example}" in " ".join(told.split()) for example in command.examples)
    assert all(help in told for help in command.required.values())
    assert ("--json" in told) == ("as_json" in command.options)
    assert ("--hash" in told) == ("hashes" in command.options)
    assert {"--url", "--run-dir"} <= set(told.split())


def test_what_was_measured_is_shown_by_node():
    result = BenchResult("shm", 8, 1 << 20, 1, 2.5, 3.25, 9.0, 0.5, 0.25, 0.125, 0.0625)
    (bench,) = (command for command in COMMANDS if command.name == "bench")
    (shown,) = bench.show(SESSION, Answers({S0: result, S1: result}, {}))
    assert isinstance(shown, Table)
    lines = text(shown)
    assert lines[0].split() == ["store-0", "store-1"]
    assert lines[3].split() == ["blocks", "8", "of", "1.0", "MiB", "8", "of", "1.0", "MiB"]
    assert lines[5].split() == ["put", "GB/s", "2.50", "2.50"]


def test_what_is_no_change_is_refused_before_a_cluster_is_looked_for(tmp_path: Path):
    done = CliRunner().invoke(app, ["limits", "--set", "leases_max", "--run-dir", str(tmp_path)])
    assert isinstance(done.exception, ClusterFault)
    assert "not NAME=VALUE" in str(done.exception)


def test_names_from_outside_are_no_markup():
    pins = (PinInfo(TraceId("[red]x[/]"), "[bold]", "soft", 2, 1, 2048, 61.0),)
    assert text(pins_table({S0: PinList(pins)}))[2].split() == [
        "store-0",
        "[red]x[/]",
        "[bold]",
        "soft",
        "2",
        "1",
        "2.0",
        "KiB",
        "1m01s",
    ]


def test_a_node_that_did_not_answer_has_no_round_trip():
    lines = text(ping_table(found().stores, {S0: [0.001, 0.003]}))
    assert lines[2].split() == ["store-0", "ready", "x:1", "2.00", "3.00"]
    assert lines[3].split() == ["store-1", "dead", "-", "-", "-"]


def test_nodes_that_failed_alike_are_told_together():
    end({})
    with pytest.raises(ClusterFault, match=r"^store-0, store-1 refuse: no; store-2 is dead$"):
        end({S0: "refuse: no", S1: "refuse: no", NodeId("store-2"): "is dead"})
