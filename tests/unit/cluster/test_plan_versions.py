"""A node reads a plan that a later version has written: a fleet is upgraded one node at a time."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.config import ClusterConfig, PoolConfig
from cluster.known import known_part
from cluster.plan import Plan, PoolPlan, load_plan, nodes_of, save_plan
from cluster.rundir import ClusterFault, RunDir
from kvstore.config import StoreConfig
from tracehaul.model.source import ModelSource
from worker.config import WorkerConfig


def grown(value: Any) -> Any:
    if isinstance(value, dict):
        return {**{key: grown(inner) for key, inner in value.items()}, "added_later": {"x": [1]}}
    if isinstance(value, list):
        return [grown(inner) for inner in value]
    return value


def a_plan(path: Path) -> Plan:
    config = ClusterConfig(pools={"a": PoolConfig(model="m", worker=WorkerConfig(chunk_tokens=32))})
    pools = (PoolPlan("a", ModelSource("m", path, "hf", "llama"), config.pools["a"]),)
    return Plan(config, pools, StoreConfig(arena_bytes=1 << 20, slot_bytes=4096), nodes_of(config, 7000), name="ours")


def test_what_was_added_is_not_read(tmp_path: Path) -> None:
    run, plan = RunDir(tmp_path), a_plan(tmp_path)
    save_plan(run, plan)
    said = msgspec.json.decode(run.plan_file.read_bytes())
    for name in ("pools", "prices", "quota_bytes", "attach"):  # what maps names to something has no fields
        for holder in (said["config"], said["store"], said["pools"][0]["config"]):
            holder.pop(name, None)
    later = grown(said)
    assert later != said
    run.plan_file.write_bytes(msgspec.json.encode(later))
    expected = msgspec.structs.replace(plan, config=msgspec.structs.replace(plan.config, pools={}))
    assert load_plan(run) == expected


def test_what_is_wrong_is_still_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save_plan(run, a_plan(tmp_path))
    said = msgspec.json.decode(run.plan_file.read_bytes())
    said["nodes"][0]["control_port"] = "many"
    run.plan_file.write_bytes(msgspec.json.encode(said))
    with pytest.raises(ClusterFault, match="control_port"):
        load_plan(run)


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    a: int = 0


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    maybe: Inner | None = None
    named: dict[str, Inner] = {}
    pair: tuple[Inner, int] = (Inner(), 0)
    many: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ({"maybe": {"a": 1, "b": 2}, "more": 1}, {"maybe": {"a": 1}}),
        ({"maybe": None}, {"maybe": None}),
        ({"named": {"x": {"b": 1}}}, {"named": {"x": {}}}),
        ({"pair": [{"b": 1}, 3]}, {"pair": [{}, 3]}),
        ({"many": [{"b": 1}, {"a": 2}]}, {"many": [{}, {"a": 2}]}),
        ({"many": 3}, {"many": 3}),
    ],
)
def test_structs_wherever_they_are(said: Any, known: Any) -> None:
    assert known_part(said, msgspec.inspect.type_info(Outer)) == known
