"""Who serves the replay: vLLM servers in each arrangement, on all of this process's cores and in so many bytes."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
from rich.console import Console

from bench.common.fleet import environment, fleet
from bench.engines.stock import CHECKOUT, START_TIMEOUT_S
from bench.peers.vllm_server import Peers, options, vllm_server
from bench.replay.run import Target
from bench.replay.sticky import Sticky
from cluster.config import ClusterConfig, NodeCounts, PoolConfig
from cluster.launch import free_port

SERVERS = 2
MODEL = "model"
"""What clients call it by, whoever serves it."""


class Sizes(msgspec.Struct, frozen=True):
    """Bytes of KV, of all servers together."""

    kv_bytes: int
    """Where memory is short."""
    beneath_bytes: int
    """Of the store, or of LMCache's process."""
    ample_bytes: int
    """Where every context stays where it was computed."""
    context_max: int
    """Tokens."""
    batch_tokens: int = 2048
    """The most that an iteration of theirs computes."""
    our_batch_tokens: int = 512


class Serving(NamedTuple):
    """Something that answers."""

    target: Target
    transport: httpx.AsyncBaseTransport | None = None


@contextlib.contextmanager
def sticky(peers: Peers, model: Path, kv_bytes: int, sizes: Sizes) -> Generator[Serving]:
    """Plain servers, each on its share of the cores; a trace stays with the one that it began at."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        urls = [
            stack.enter_context(
                vllm_server(
                    peers,
                    model,
                    kv_bytes=kv_bytes // SERVERS,
                    context_max=sizes.context_max,
                    cores=cores[server::SERVERS] or cores,
                    batch_tokens=sizes.batch_tokens,
                )
            )
            for server in range(SERVERS)
        ]
        yield Serving(Target(urls[0], MODEL), Sticky(urls))


@contextlib.contextmanager
def lmcache(peers: Peers, model: Path, sizes: Sizes) -> Generator[Serving]:
    """One server on all cores, which is how LMCache does best here, and its process beside."""
    server = vllm_server(
        peers,
        model,
        kv_bytes=sizes.kv_bytes,
        context_max=sizes.context_max,
        lmcache_bytes=sizes.beneath_bytes,
        batch_tokens=sizes.batch_tokens,
    )
    with server as url:
        yield Serving(Target(url, MODEL))


@contextlib.contextmanager
def ours(peers: Peers, model: Path, sizes: Sizes, console: Console) -> Generator[Serving]:
    """Our router over as many servers as :func:`sticky` has, with our store."""
    pool = PoolConfig(
        model=str(model),
        serves=MODEL,
        prefill=0,
        decode=SERVERS,
        engine="vllm",
        engine_python=str(peers.vllm),
        engine_args=tuple(options(sizes.kv_bytes // SERVERS, sizes.context_max, sizes.our_batch_tokens)),
    )
    config = ClusterConfig(
        port=free_port(),
        nodes=NodeCounts(store=1),
        pools={"vllm": pool},
        store_bytes=sizes.beneath_bytes,
        start_timeout_s=START_TIMEOUT_S,
    )
    threads = max(1, len(os.sched_getaffinity(0)) // SERVERS)
    # Not bound to cores of their own: the router, the store and the adapters want some of each.
    said = {"PYTHONPATH": str(CHECKOUT), "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    said |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    with environment(said), fleet(config, console) as running:
        yield Serving(Target(running.url, MODEL))
