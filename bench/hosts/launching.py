"""How long it takes to bring up a fleet whose releases are installed: three hosts of namespaces, four nodes on each."""

import os
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from bench.common.report import Result
from bench.hosts.rig import Host, rig, why_not
from tracehaul.runtime import clock

NAMES = ("a", "b", "c")
NODES = "{ router = 1, store = 1, prefill = 1, decode = 1 }"
HEAD = """\
host = "0.0.0.0"
port = 8130
transport = "tcp"
kv_tokens = 4096
store_bytes = 134217728
threads = 1
[api]
open = true
[security]
authority = "{folder}/authority"
"""
PHASES = ("loading model", "joining")


def measure() -> list[Result]:
    """``hosts.launch``: from the command to all serving; ``hosts.launch.model``: the longest that a node's model took
    of that; ``hosts.launch.again``: where nothing has changed."""
    if (why := why_not()) is not None:
        raise SystemExit(f"no hosts can be made here: {why}")
    with tempfile.TemporaryDirectory(prefix="tracehaul-bench-") as folder:
        file = Path(folder) / "cluster.toml"
        environment = f'home = "/srv/tracehaul"\nenvironment = "{sys.prefix}"\nnodes = {NODES}\n'
        file.write_text(
            HEAD.format(folder=folder) + "".join(f'[[hosts]]\nname = "{name}"\n{environment}' for name in NAMES)
        )
        with rig(Path(folder) / "rig", NAMES, "thb", "10.77.8") as made:

            def ask(command: str) -> float:
                words = [sys.executable, "-m", "cluster.cli", command, "--config", str(file)]
                began_s = clock.perf_s()
                subprocess.run(words, env={**os.environ, "TRACEHAUL_SSH": made.ssh}, check=True, capture_output=True)
                return clock.perf_s() - began_s

            ask("launch")  # models travel, and kernels are compiled
            ask("stop")
            launch_s = ask("launch")
            model_s = max(_model_s(host) for host in made.hosts.values())
            again_s = ask("launch")
            ask("stop")
    return [
        Result("hosts.launch", launch_s, "s"),
        Result("hosts.launch.model", model_s, "s"),
        Result("hosts.launch.again", again_s, "s"),
    ]


def _model_s(host: Host) -> float:
    """The longest that a node of this host was loading its model in its last life."""
    longest_s = 0.0
    for log in (host.root / "tracehaul" / "run" / "logs").glob("*-0.log"):
        at: dict[str, float] = {}
        for line in log.read_text().splitlines():
            for phase in PHASES:
                if f'phase="{phase}"' in line or f"phase={phase} " in line:
                    at[phase] = datetime.fromisoformat(line.split()[0]).timestamp()
        if len(at) == len(PHASES):
            longest_s = max(longest_s, at["joining"] - at["loading model"])
    return longest_s
