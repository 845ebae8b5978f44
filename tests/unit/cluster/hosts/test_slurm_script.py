"""The batch script of a plan: what Slurm is asked for, where its hosts are, and that a shell can read it."""

import shutil
import subprocess

import msgspec
import pytest

from cluster.config import ClusterConfig
from cluster.hosts.slurm import PLAN_VARIABLE, SlurmJob, batch_script, gpus_of, hosts_of, placed
from cluster.plan import NodeSpec, Plan
from tests.unit.cluster.hosts.plans import plan

JOB = SlurmJob("/opt/tracehaul/bin/tracehaul", "/srv/run dir")
AT = {"a": "10.9.0.1", "b": "10.9.0.2"}


def head(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#SBATCH")]


def test_slurm_is_asked_for_the_plans_hosts_and_gpus():
    job = msgspec.structs.replace(JOB, partition="gpu", time="2-0", cpus=8, options=("--account=us",))
    assert head(batch_script(plan(), job)) == [
        "#SBATCH --job-name=tracehaul",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gres=gpu:4",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=2-0",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:TERM@60",
        "#SBATCH --account=us",
    ]
    assert "#SBATCH --exclusive" in head(batch_script(plan(), JOB))


def test_the_warning_comes_early_enough_for_the_drain():
    assert "#SBATCH --signal=B:TERM@330" in head(batch_script(plan(ClusterConfig(drain_timeout_s=100.0)), JOB))


def test_a_shell_reads_it_and_finds_the_plan_in_it():
    bash = shutil.which("bash")
    assert bash
    text = batch_script(plan(ClusterConfig(quota_bytes={'o\'neill "$x" `y`': 1})), JOB)
    assert subprocess.run([bash, "-n"], input=text, text=True, capture_output=True).stderr == ""
    until = text.split("\nsay()")[0]
    printed = subprocess.run(
        [bash, "-c", f'{until}\nprintf %s "${PLAN_VARIABLE}"; printf "|%s" "$RUN_DIR" "${{HOSTS[@]}}" >&2'],
        capture_output=True,
        text=True,
        check=True,
    )
    there = msgspec.json.decode(printed.stdout, type=Plan, dec_hook=lambda kind, value: kind(value))
    assert there == plan(ClusterConfig(quota_bytes={'o\'neill "$x" `y`': 1}))
    assert printed.stderr == "|/srv/run dir|a|b"


def test_hosts_are_where_the_allocation_has_them():
    moved = placed(plan(), AT)
    assert {spec.name: (spec.listen, spec.control) for spec in moved.nodes if spec.host == "b"} == {
        "store-b-0": ("10.9.0.2", "10.9.0.2:7200"),
        "decode-b-0": ("10.9.0.2", "10.9.0.2:7600"),
    }
    assert moved.routers == ("10.9.0.1:7000",)
    assert moved.node("store-a-0").listen == "0.0.0.0"
    assert hosts_of(moved) == ["a", "b"]
    assert gpus_of(moved) == 4


def test_a_plan_of_one_host_stays_on_its_loopback():
    alone = msgspec.structs.replace(plan(), nodes=(NodeSpec("router-0", "router"), NodeSpec("store-0", "store")))
    assert {spec.address for spec in placed(alone, {"": "10.9.0.1"}).nodes} == {"127.0.0.1"}
    seen = msgspec.structs.replace(alone, nodes=(NodeSpec("store-0", "store", listen="::", address="10.0.0.9"),))
    assert placed(seen, {"": "10.9.0.1"}).nodes[0].address == "10.9.0.1"
    assert gpus_of(alone) == 0
    assert not any("gres" in line for line in head(batch_script(alone, JOB)))


def test_a_router_that_others_could_not_find_is_refused():
    there = plan()
    lost = msgspec.structs.replace(there.nodes[0], control_port=0)
    with pytest.raises(ValueError, match="control_port"):
        placed(msgspec.structs.replace(there, nodes=(lost, *there.nodes[1:])), AT)
