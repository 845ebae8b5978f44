"""Sampling by OpenAI's own client, over real processes and the default model."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig
from cluster.launch import free_port
from worker.config import WorkerConfig

MESSAGES: list[Any] = [{"role": "user", "content": "Name the seven days of the week."}]

pytestmark = pytest.mark.xdist_group("sampling")


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig(
        dtype="float32",
        transport="shm",
        port=free_port(),
        kv_tokens=8192,
        store_bytes=64 << 20,
        worker=WorkerConfig(chunk_tokens=256, local_prefill_tokens=64),
    )


@pytest.fixture
def client(cluster: Fleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAI]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def test_logprobs(client: OpenAI, cluster: Fleet) -> None:
    fields: Any = {"messages": MESSAGES, "model": cluster.model, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=4)
    choice = whole.choices[0]
    assert choice.logprobs is not None
    told = choice.logprobs.content
    assert told is not None
    assert whole.usage is not None
    assert len(told) == whole.usage.completion_tokens == 8
    assert b"".join(bytes(entry.bytes or []) for entry in told).decode() == choice.message.content
    for entry in told:
        assert len(entry.top_logprobs) == 4
        assert entry.top_logprobs[0].token == entry.token
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.001
    stream = client.chat.completions.create(**fields, logprobs=True, stream=True)
    pieces = [c for chunk in stream for c in chunk.choices if c.logprobs is not None]
    again = [entry for piece in pieces if piece.logprobs for entry in piece.logprobs.content or []]
    # Over the prefill worker or not, streamed or not: the first token's logprob is told, and once.
    assert [entry.token for entry in again] == [entry.token for entry in told]
    assert all(abs(a.logprob - b.logprob) < 1e-3 for a, b in zip(again, told, strict=True))
    with pytest.raises(BadRequestError):
        client.chat.completions.create(**fields, top_logprobs=2)


def test_an_echo_is_scored_as_it_would_be_said(client: OpenAI, cluster: Fleet) -> None:
    fields: Any = {"model": cluster.model, "temperature": 0}
    said = client.completions.create(prompt="The capital of France is", max_tokens=6, logprobs=1, **fields).choices[0]
    text = f"The capital of France is{said.text}"
    heard = client.completions.create(prompt=text, max_tokens=0, echo=True, logprobs=1, **fields).choices[0]
    assert heard.text == text
    assert said.logprobs is not None
    assert heard.logprobs is not None
    assert heard.logprobs.token_logprobs is not None
    assert heard.logprobs.tokens is not None
    assert said.logprobs.tokens is not None
    assert "".join(heard.logprobs.tokens) == text
    assert heard.logprobs.token_logprobs[0] is None
    assert heard.logprobs.tokens[-6:] == said.logprobs.tokens
    for a, b in zip(heard.logprobs.token_logprobs[-6:], said.logprobs.token_logprobs or [], strict=True):
        assert abs(a - b) < 1e-3


def test_a_seed_gives_the_same_whatever_shares_the_batch(client: OpenAI, cluster: Fleet) -> None:
    def ask(seed: int, **more: Any) -> list[str | None]:
        answer = client.chat.completions.create(
            messages=MESSAGES, model=cluster.model, max_tokens=16, temperature=0.9, top_p=0.95, seed=seed, **more
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.message.content for choice in answer.choices]

    alone = [ask(seed)[0] for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: ask(seed, presence_penalty=0)[0], range(4)))
    assert together == alone
    three = ask(2, n=3)
    assert three[0] == alone[2]
    assert len(set(three)) > 1
    assert ask(2, n=3) == three


def test_choices_share_a_prompt_that_is_computed_once(client: OpenAI, cluster: Fleet) -> None:
    words = " ".join(f"Item {number} costs {number * 7 % 100} coins." for number in range(60))
    answer = client.completions.create(model=cluster.model, prompt=words, max_tokens=4, n=4, temperature=1, seed=1)
    assert answer.usage is not None
    prompt_tokens = answer.usage.prompt_tokens
    assert prompt_tokens > 500
    assert len(answer.choices) == 4
    # One worker computes it, a decode worker where prefill is busy; all others have it but for a part of a block.
    moved = (answer.usage.model_extra or {})["tracehaul"]
    assert moved["pulled_tokens"] + moved["resident_tokens"] > 3 * (prompt_tokens - 32)
    assert moved["missed_blocks"] == 0


def test_stop_strings_and_biases(client: OpenAI, cluster: Fleet) -> None:
    fields: Any = {"messages": MESSAGES, "model": cluster.model, "temperature": 0, "max_tokens": 24}
    free = client.chat.completions.create(**fields).choices[0].message.content
    assert free is not None
    stop = free[4:9]
    cut = client.chat.completions.create(**fields, stop=[stop, "never said"]).choices[0]
    assert cut.message.content == free[: free.index(stop)]
    assert cut.finish_reason == "stop"
    told = client.chat.completions.create(**fields, extra_body={"return_token_ids": True}).choices[0]
    first: int = told.model_extra["token_ids"][0] if told.model_extra else 0
    other = client.chat.completions.create(**fields, logit_bias={str(first): -100}).choices[0].message.content
    assert other is not None
    assert not other.startswith(free[:4])
