"""vLLM as its users start it: an OpenAI server on this machine's cores, alone or with LMCache beside it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from cluster.launch import free_port
from tracehaul.runtime import clock

READY_TIMEOUT_S = 600.0
POLL_S = 0.5
END_S = 20.0
LMCACHE_CHUNK_TOKENS = 64
LOG_CHARACTERS = 2000


class Peers(NamedTuple):
    """Where ``scripts/peers`` installed them."""

    folder: Path

    @property
    def vllm(self) -> Path:
        """Its interpreter."""
        return self.folder / "vllm/bin/python"

    @property
    def lmcache(self) -> Path:
        """What goes on its path for LMCache."""
        return self.folder / "lmcache"


@contextlib.contextmanager
def vllm_server(
    peers: Peers,
    model: Path,
    *,
    kv_bytes: int,
    context_max: int,
    lmcache_bytes: int = 0,
    cores: Sequence[int] | None = None,
    batch_tokens: int = 2048,
) -> Generator[str, None, None]:
    """A server of ``model`` with so much KV memory; its address.

    Args:
        peers: where it is installed.
        model: a folder in the hub's layout.
        kv_bytes: of its own KV cache.
        context_max: tokens.
        lmcache_bytes: of host memory of an LMCache process that takes what the server's cache gives up; 0: none.
        cores: those that it computes on; None: all that this process may use.
        batch_tokens: the most that one of its iterations computes.

    Raises:
        RuntimeError: one of the processes ended before it was ready, or was not ready in time.
    """
    logs = Path(tempfile.mkdtemp(prefix="tracehaul-vllm-"))
    port, cache_port = free_port(), free_port()
    bound = sorted(os.sched_getaffinity(0) if cores is None else cores)
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in bound),
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(logs / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(peers.vllm), "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "model"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--block-size", "32"]
    command += ["--enable-prompt-tokens-details", *options(kv_bytes, context_max, batch_tokens)]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, logs, ignore_errors=True)
        started: list[tuple[str, subprocess.Popen[bytes]]] = []
        if lmcache_bytes:
            environment |= {"PYTHONPATH": str(peers.lmcache), "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"}
            cache = [str(peers.vllm), "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1"]
            cache += ["--port", str(cache_port), "--chunk-size", str(LMCACHE_CHUNK_TOKENS), "--eviction-policy", "LRU"]
            cache += ["--l1-size-gb", str(lmcache_bytes / 2**30), "--supported-transfer-mode", "auto"]
            started.append(("lmcache", _start(cache, environment, logs / "lmcache.log", stack)))
            connector = {
                "kv_connector": "LMCacheMPConnector",
                "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": cache_port},
            }
            command += ["--kv-transfer-config", json.dumps(connector)]
        started.append(("vllm", _start(command, environment, logs / "vllm.log", stack)))
        url = f"http://127.0.0.1:{port}"
        _wait(url, started, logs)
        yield url


def options(kv_bytes: int, context_max: int, batch_tokens: int) -> list[str]:
    """What a server is told of its memory and batches, whoever starts it."""
    sizes = ["--kv-cache-memory-bytes", str(kv_bytes), "--max-model-len", str(context_max)]
    batches = ["--max-num-batched-tokens", str(batch_tokens), "--max-num-seqs", "32"]
    return [*sizes, *batches, "--enable-prefix-caching", "--disable-uvicorn-access-log", "--enforce-eager"]


def _start(
    command: Sequence[str], environment: dict[str, str], log: Path, stack: contextlib.ExitStack
) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
        )
    stack.callback(_end, process)
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    """With all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
            return


def _wait(url: str, started: "Sequence[tuple[str, subprocess.Popen[bytes]]]", logs: Path) -> None:
    until_s = clock.perf_s() + READY_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=2.0, trust_env=False).is_success:
                return
        for name, process in started:
            if process.poll() is not None:
                said = (logs / f"{name}.log").read_text(errors="replace")[-LOG_CHARACTERS:]
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{said}")
        if clock.perf_s() > until_s:
            raise RuntimeError(f"vllm was not ready after {READY_TIMEOUT_S:.0f} s")
        with contextlib.suppress(subprocess.TimeoutExpired):
            started[-1][1].wait(POLL_S)
