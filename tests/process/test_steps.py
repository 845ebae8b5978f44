"""An agent's steps over real processes: the tokens of one engine alone, and hardly anything computed twice."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
from openai import OpenAI
from openai.types import CompletionUsage

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from router.dispatch.config import DispatchConfig
from tracehaul.wire.steps import Sampling
from worker.config import WorkerConfig

Alone = Callable[[Sequence[int], Sampling], list[int]]

BLOCK_TOKENS = 32
LOCAL_TOKENS = 64
OUTPUT_TOKENS = 12
STEPS = (
    (300, "decode-0"),  # from nothing, by the prefill worker
    (40, "decode-1"),  # pulled; computed there
    (450, "decode-0"),  # a long tool's output: what is resident, what is pulled, and the prefill worker for the rest
    (40, "decode-1"),
    (30, "decode-1"),  # nothing to pull
)
"""New tokens of each step, and where it runs."""


def on(transport: str) -> Any:
    return pytest.param(transport, marks=pytest.mark.xdist_group(f"steps-{transport}"))


@pytest.fixture(scope="module", params=[on("shm"), on("tcp"), on("nixl")])
def config(request: pytest.FixtureRequest) -> ClusterConfig:
    transport: Literal["shm", "tcp", "nixl"] = request.param
    return ClusterConfig(
        dtype="float32",
        transport=transport,
        port=free_port(),
        nodes=NodeCounts(decode=2),
        dispatch=DispatchConfig(policy="sticky"),  # prices depend on the machine: what is long is prefilled elsewhere
        kv_tokens=4096,
        store_bytes=64 << 20,
        worker=WorkerConfig(chunk_tokens=256, local_prefill_tokens=LOCAL_TOKENS),
    )


def words(count: int, seed: int) -> list[int]:
    """Any tokens will do: KV does not care about sense."""
    generator = random.Random(seed)
    return [generator.randrange(1000, 40_000) for _ in range(count)]


def prefills(cluster: Fleet) -> float:
    return cluster.metric("prefill-0", "tracehaul_worker_steps_total")


def test_an_agents_trace_is_that_of_one_engine(cluster: Fleet, alone: Alone):
    prompt: list[int] = []
    before = ""
    for index, (new, decode) in enumerate(STEPS):
        prompt = prompt + words(new, index)
        handed_off = prefills(cluster)
        step = cluster.step("agent", prompt, OUTPUT_TOKENS, decode, ignore_eos=True)

        assert step.tokens == alone(prompt, Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0))
        assert step.finish_reason == "length"
        assert step.usage["prompt_tokens"] == len(prompt)
        assert step.usage["completion_tokens"] == OUTPUT_TOKENS
        computed = len(prompt) - step.cached_tokens
        assert new <= computed <= new + BLOCK_TOKENS
        assert step.moved["missed_blocks"] == 0
        assert step.moved["prefill_fallback"] == ""
        assert prefills(cluster) - handed_off == (1 if new > LOCAL_TOKENS else 0)
        if decode == before:
            assert step.moved["pulled_tokens"] == 0
        elif index > 0:
            assert step.moved["pulled_bytes"] > 0

        prompt = prompt + step.tokens
        before = decode


def test_a_seed_gives_the_same_tokens_on_every_worker(cluster: Fleet, alone: Alone):
    prompt = words(50, 100)
    sampling = Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.8, top_p=0.95, seed=7)
    expected = alone(prompt, sampling)
    assert expected != alone(prompt, Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0))
    for decode in ("decode-0", "decode-1"):
        step = cluster.step(
            f"seeded-{decode}", prompt, OUTPUT_TOKENS, decode, ignore_eos=True, temperature=0.8, top_p=0.95, seed=7
        )
        assert step.tokens == expected


def test_a_chat_by_openais_client(cluster: Fleet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=60)
    question: list[Any] = [{"role": "user", "content": "Name the seven days of the week."}]

    def ask(messages: list[Any], trace: str, decode: str) -> tuple[str, CompletionUsage]:
        whole = client.chat.completions.create(
            messages=messages,
            model=cluster.model,
            temperature=0,
            max_tokens=24,
            extra_headers={"X-Trace-Id": trace, "X-Decode-Worker": decode},
        )
        assert whole.choices[0].message.content
        assert whole.usage
        return whole.choices[0].message.content, whole.usage

    text, usage = ask(question, "chat", "decode-0")
    assert "Monday" in text
    stream = client.chat.completions.create(
        messages=question,
        model=cluster.model,
        temperature=0,
        max_tokens=24,
        stream=True,
        extra_headers={"X-Trace-Id": "another", "X-Decode-Worker": "decode-1"},
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 5
    assert "".join(pieces) == text

    turn = [*question, {"role": "assistant", "content": text}, {"role": "user", "content": "And the months?"}]
    _, again = ask(turn, "chat", "decode-1")
    assert again.prompt_tokens_details
    new = again.prompt_tokens - usage.total_tokens
    computed = again.prompt_tokens - (again.prompt_tokens_details.cached_tokens or 0)
    assert 0 < new <= computed <= new + BLOCK_TOKENS
