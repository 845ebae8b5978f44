"""The batch script under a real Slurm: steps come up, a killed one comes back, the job is requeued, and it drains."""

import os
import shutil
import sys
from collections.abc import Generator
from pathlib import Path

import msgspec
import pytest

from cluster.hosts.restarts import RestartPolicy
from cluster.hosts.slurm import SlurmJob, batch_script
from cluster.plan import NodeSpec
from cluster.rundir import RunDir, start_ticks
from tests.hosts.slurm_site import HOSTS, PROGRAMS, SlurmSite
from tests.process.host_nodes import make_plan

MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons must run as root"),
]


@pytest.fixture
def site(tmp_path: Path) -> Generator[SlurmSite, None, None]:
    site = SlurmSite(tmp_path)
    try:
        site.start()
        yield site
    finally:
        site.close()


def test_steps_come_up_come_back_and_drain(site: SlurmSite):
    plan = make_plan(3)
    router, *stores = plan.nodes
    nodes = [msgspec.structs.replace(router, host="a")]
    nodes += [msgspec.structs.replace(spec, host=host) for spec, host in zip(stores, "abc", strict=True)]
    plan = msgspec.structs.replace(plan, nodes=tuple(nodes))
    runs = {host: RunDir(site.folder / "run" / host) for host in "abc"}
    script = site.folder / "job.sbatch"
    output = site.folder / "job.log"
    script.write_text(
        batch_script(
            plan,
            SlurmJob(
                f"{sys.executable} -m cluster.cli",
                str(site.folder / "run"),
                cpus=1,
                options=(f"--output={output}",),
                restarts=RestartPolicy(deaths_max=1),
            ),
        )
    )
    number = site.call("sbatch", "--parsable", str(script)).strip()

    def pid_of(spec: NodeSpec) -> int:
        """Of a node that serves; 0 if it does not."""
        run = runs[spec.host]
        found = {record.name: record for record in run.records()}.get(spec.name)
        serves = found is not None and start_ticks(found.pid) == found.start_ticks
        return found.pid if found and serves and run.state(spec.name).phase == "ready" else 0

    def all_serve() -> bool:
        return all(pid_of(spec) for spec in plan.nodes)

    site.until(all_serve, "the nodes do not serve")
    steps = site.steps(number)
    assert sorted(steps) == ["tracehaul-a", "tracehaul-b", "tracehaul-c"]
    told = output.read_text()
    for host, (name, address) in zip("abc", HOSTS.items(), strict=True):
        assert f"{host} is {name} ({address})" in told
    before = {spec.name: pid_of(spec) for spec in plan.nodes}

    site.call("scancel", "--signal=KILL", steps["tracehaul-b"])
    site.until(lambda: site.steps(number).get("tracehaul-b") not in (None, steps["tracehaul-b"]), "the step")
    site.until(all_serve, "the nodes of the step do not come back")
    after = {spec.name: pid_of(spec) for spec in plan.nodes}
    assert {name for name in before if before[name] != after[name]} == {"store-1"}

    # Once more is more than the script bears: the whole job is begun anew.
    site.call("scancel", "--signal=KILL", site.steps(number)["tracehaul-b"])
    site.until(lambda: site.job(number)["Restarts"] == "1", "the job is not requeued")
    site.until(lambda: site.job(number)["JobState"] == "RUNNING", "the job does not run again")
    site.until(lambda: len(site.steps(number)) == 3 and all_serve(), "the nodes do not serve again")
    assert all(pid_of(spec) != after[spec.name] for spec in plan.nodes)

    # As before the end of its time: the script alone is told.
    left = [pid_of(spec) for spec in plan.nodes]
    site.call("scancel", "--batch", "--signal=TERM", number)
    site.until(lambda: site.job(number)["JobState"] == "COMPLETED", "the job does not end")
    assert site.job(number)["ExitCode"] == "0:0"
    assert output.read_text().rstrip().endswith("drained")
    assert not any(start_ticks(pid) for pid in left)
    for spec in plan.nodes:
        assert runs[spec.host].log_tail(spec.name, 1)[0].endswith("ended")
