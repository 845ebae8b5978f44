"""Slurm on one machine: a controller and three daemons, each of which is a host."""

import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from cluster.launch import free_port
from tracehaul.runtime import clock

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
HOSTS = {"site-a": "127.0.0.2", "site-b": "127.0.0.3", "site-c": "127.0.0.4"}

_CONFIG = """
ClusterName=site
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,sched_interval=1,bf_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=10 State=UP
"""


class SlurmSite:
    """Its daemons are this object's children; closing ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pause = threading.Event()
        self._daemons: list[subprocess.Popen[bytes]] = []
        name = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={host} NodeHostname={name} NodeAddr={address} Port={free_port()} CPUs=1 RealMemory=100"
            for host, address in HOSTS.items()
        )
        (folder / "state").mkdir()
        config = folder / "slurm.conf"
        config.write_text(_CONFIG.format(name=name, port=free_port(), folder=folder, nodes=nodes))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\n")
        self.environment = os.environ | {"SLURM_CONF": str(config)}

    def start(self) -> None:
        """Until every host is idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {name: str(self.folder / f"munge.{name}") for name in ("socket", "pid", "seed", "log")}
        self._spawn(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={files['socket']}",
            f"--pid-file={files['pid']}",
            f"--seed-file={files['seed']}",
            f"--log-file={files['log']}",
        )
        self.until(lambda: Path(files["socket"]).exists(), "munged")
        self._spawn("slurmctld", "-D")
        for host in HOSTS:
            self._spawn("slurmd", "-D", "-N", host)
        self.until(
            lambda: self.call("sinfo", "--noheader", "--format=%D %t", check=False).split() == ["3", "idle"], "slurmd"
        )

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        assert not check or done.returncode == 0, (command, done.stderr)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol`` says of it."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def steps(self, number: str) -> dict[str, str]:
        """Those that run, by name: their ids."""
        lines = self.call("squeue", "--steps", "--noheader", f"--jobs={number}", "--format=%i %j").splitlines()
        return {line.split()[1]: line.split()[0] for line in lines if line.split()[1].startswith("tracehaul-")}

    def until(self, true: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        began = clock.perf_s()
        while not true():
            assert clock.perf_s() - began < timeout_s, f"{what}\n{self.told()}"
            self._pause.wait(0.1)

    def told(self) -> str:
        """The ends of all logs and outputs."""
        return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.rglob("*.log")))

    def close(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _spawn(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out.log").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            )
