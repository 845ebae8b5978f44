"""Processes killed, frozen and left alone in the middle of an agent's steps: time is lost, tokens never."""

import os
import random
import re
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import msgspec
import pytest

from bench.common.fleet import Fleet, Step
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from cluster.processes import alive as runs
from kvstore.client.client import BREAK_S
from router.dispatch.config import DispatchConfig
from tests.waiting import wait_until
from tracehaul.wire.steps import Sampling
from worker.config import WorkerConfig

Alone = Callable[[Sequence[int], Sampling], list[int]]

BLOCK_TOKENS = 32
OUTPUT_TOKENS = 8
NEW_TOKENS = 30
STORE_TIMEOUT_S = 3.0
NOTICED_S = 20.0
"""In which a cluster has noticed, and told, what was done to it."""
ATTEMPTS = 5

pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig(
        dtype="float32",
        port=free_port(),
        nodes=NodeCounts(decode=2),
        dispatch=DispatchConfig(policy="sticky"),  # prices depend on the machine: what is long is prefilled elsewhere
        kv_tokens=2048,
        store_bytes=64 << 20,
        # Small groups and chunks: there is a middle to be hit. Much headroom: two long answers do not fit one worker.
        worker=WorkerConfig(
            chunk_tokens=64,
            local_prefill_tokens=64,
            group_blocks=1,
            headroom_tokens=1024,
            store_timeout_s=STORE_TIMEOUT_S,
        ),
    )


@pytest.fixture(autouse=True)
def whole_again(cluster: Fleet) -> Generator[None, None, None]:
    """Each test finds every node running."""
    yield
    dead = [record.name for record in cluster.run.records() if not runs(record)]
    if dead:
        cluster.restart(dead)
    wait_until(lambda: len(ready(cluster)) == 4, NOTICED_S)


def words(count: int, seed: str) -> list[int]:
    """Any tokens will do, but no two texts may share blocks."""
    generator = random.Random(seed)
    return [generator.randrange(1000, 40_000) for _ in range(count)]


def ready(cluster: Fleet) -> set[str]:
    return {node["info"]["node"] for node in cluster.nodes() if node["health"] == "ready"}


def send(cluster: Fleet, node: str, number: signal.Signals) -> None:
    os.kill(cluster.pids()[node], number)


def idle(cluster: Fleet) -> bool:
    """By the workers' own account."""
    return all(
        cluster.metric(node, f"tracehaul_node_{what}") == 0
        for node in ("prefill-0", "decode-0", "decode-1")
        for what in ("running", "waiting")
    )


def known_idle(cluster: Fleet) -> bool:
    """As far as the router knows."""
    return all(node["load"]["running"] + node["load"]["waiting"] == 0 for node in cluster.nodes())


def recomputed(cluster: Fleet, reason: str) -> float:
    return cluster.metric("router-0", f'tracehaul_router_recomputed_tokens_total{{reason="{reason}"}}')


class Agent:
    """A trace whose every answer is compared with that of one engine alone."""

    def __init__(self, cluster: Fleet, alone: Alone, name: str, size: int) -> None:
        self._cluster = cluster
        self._alone = alone
        self.name = name
        self._steps = 0
        self.prompt = words(size, name)
        self.computed = 0
        """Prompt tokens that the last step computed."""

    def expected(self) -> list[int]:
        return self._alone(self.prompt, Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0))

    def step(self, decode: str) -> Step:
        """The next step, on that worker; the prompt after it is longer."""
        step = self._cluster.step(self.name, self.prompt, OUTPUT_TOKENS, decode, ignore_eos=True)
        assert step.tokens == self.expected()
        assert step.finish_reason == "length"
        self.computed = len(self.prompt) - step.cached_tokens
        self._steps += 1
        self.prompt = self.prompt + step.tokens + words(NEW_TOKENS, f"{self.name} {self._steps}")
        return step

    def cached_step(self, decode: str) -> Step:
        """The next step, which must compute little more than what is new."""
        step = self.step(decode)
        assert NEW_TOKENS <= self.computed <= NEW_TOKENS + BLOCK_TOKENS
        return step


def test_a_killed_store_is_recomputed_and_its_successor_used(cluster: Fleet, alone: Alone):
    agent = Agent(cluster, alone, "store-dies", 250)
    agent.step("decode-0")
    lost_before = recomputed(cluster, "placement")
    send(cluster, "store-0", signal.SIGKILL)
    wait_until(lambda: "store-0" not in ready(cluster), NOTICED_S)

    agent.step("decode-1")  # decode-0 has it all, and only the store could have brought it here
    assert recomputed(cluster, "placement") - lost_before >= 250 // BLOCK_TOKENS * BLOCK_TOKENS

    cluster.restart(["store-0"])
    agent.cached_step("decode-1")  # resident there, and written to the new store
    for _ in range(ATTEMPTS):  # where others compute too a pull may be late, and what it was to bring is computed
        step = agent.step("decode-0")
        if step.moved["pulled_bytes"] > 0 and agent.computed <= NEW_TOKENS + BLOCK_TOKENS:
            return
        agent.step("decode-1")  # what decode-0 lacks next is more than it may compute
    pytest.fail(f"in {ATTEMPTS} steps the new store has not brought what the other worker has written there")


def test_a_stream_survives_its_decode_worker(cluster: Fleet, alone: Alone):
    """Sampled, not greedy: what follows depends on every position's randomness too."""
    prompt, output = words(100, "decode-dies"), 40
    expected = alone(prompt, Sampling(max_tokens=output, temperature=0.9, seed=11))
    tokens: list[int] = []
    usage = {}
    for chunk in cluster.chunks("decode-dies", prompt, output, "decode-0", ignore_eos=True, temperature=0.9, seed=11):
        for choice in chunk["choices"]:
            tokens += choice.get("token_ids") or []
        usage = chunk.get("usage") or usage
        if len(tokens) >= 8 and runs_in(cluster, "decode-0"):
            assert len(tokens) < output // 2
            send(cluster, "decode-0", signal.SIGKILL)
    assert not runs_in(cluster, "decode-0")
    assert tokens == expected
    assert usage["completion_tokens"] == output


def test_a_structured_answer_survives_its_decode_worker(cluster: Fleet):
    """Begun by the prefill worker, gone on with by one decode worker and ended by another, in the same grammar."""
    form = "([0-9]{3} ){20}end"
    text, reason = "", None
    body = {"structured_outputs": {"regex": form}, "temperature": 0.9, "seed": 3}
    for chunk in cluster.chunks("structured", words(100, "structured"), 200, "decode-0", **body):
        for choice in chunk["choices"]:
            text += choice["text"]
            reason = choice["finish_reason"] or reason
        if len(text) >= 10 and runs_in(cluster, "decode-0"):
            assert len(text) < 60
            send(cluster, "decode-0", signal.SIGKILL)
    assert not runs_in(cluster, "decode-0")
    assert re.fullmatch(form, text)
    assert reason == "stop"


def test_a_grammar_that_only_workers_can_judge_is_refused_before_the_stream(cluster: Fleet):
    with pytest.raises(RuntimeError, match=r"400: .*grammar"):
        cluster.step("judged", words(100, "judged"), 10, structured_outputs={"grammar": "start: <|nobody|>"})


def published(cluster: Fleet) -> float:
    """Blocks, by the prefill worker."""
    return cluster.metric("prefill-0", 'tracehaul_store_client_puts_total{reason="published"}')


def runs_in(cluster: Fleet, name: str) -> bool:
    return any(record.name == name and runs(record) for record in cluster.run.records())


def test_a_prompt_survives_its_prefill_worker(cluster: Fleet, alone: Alone):
    agent = Agent(cluster, alone, "prefill-dies", 700)
    agent.expected()  # now: not while others compute
    before = published(cluster)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(agent.step, "decode-0")
        wait_until(lambda: published(cluster) >= before + 5, NOTICED_S)
        send(cluster, "prefill-0", signal.SIGKILL)
        step = pending.result(timeout=60)
    assert step.moved["prefill_fallback"] == "peer_lost"
    assert 0 < step.moved["pulled_tokens"] < 700 // BLOCK_TOKENS * BLOCK_TOKENS  # what was published was used
    agent.cached_step("decode-1")  # by decode workers alone


def test_a_frozen_store_is_given_up(cluster: Fleet, alone: Alone):
    store = cluster.pids()["store-0"]
    wrote_s = 0.0
    with ThreadPoolExecutor(1) as thread:
        for attempt in range(ATTEMPTS):  # a quick store may have sent everything before the signal reaches it
            agent = Agent(cluster, alone, f"store-freezes-{attempt}", 500)
            agent.step("decode-0")
            agent.expected()
            wrote_s = cluster.metric("decode-1", "tracehaul_store_client_put_seconds_total")
            before = turns(store)
            pending = thread.submit(agent.step, "decode-1")
            # Asked what it holds, then for one block after the other.
            while turns(store) < before + 5 and not pending.done():
                pass
            send(cluster, "store-0", signal.SIGSTOP)
            try:
                step = pending.result(timeout=60)
            finally:
                send(cluster, "store-0", signal.SIGCONT)
            wait_until(lambda: "store-0" in ready(cluster), NOTICED_S)
            if step.moved["missed_blocks"]:
                break
        else:
            pytest.fail(f"{ATTEMPTS} pulls were over before the store could be frozen")
    # The pull that it froze under waited for it; writing back did not wait as long again.
    assert step.moved["pull_s"] < 2 * STORE_TIMEOUT_S
    assert cluster.metric("decode-1", "tracehaul_store_client_put_seconds_total") - wrote_s < STORE_TIMEOUT_S - 1
    threading.Event().wait(BREAK_S)  # by then every client asks it again
    agent.step("decode-0")
    assert agent.cached_step("decode-1").moved["missed_blocks"] == 0


def turns(pid: int) -> int:
    """How often that process's main thread has gone to sleep: once for each thing it was asked, at least."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


class Client:
    """Asks for one streamed answer and can hang up at any time."""

    def __init__(self, cluster: Fleet, prompt: list[int], max_tokens: int) -> None:
        self._http = HTTPConnection(cluster.url.removeprefix("http://"), timeout=60)
        body = {"model": cluster.model, "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        headers = {"content-type": "application/json", "x-decode-worker": "decode-0"}
        self._http.request("POST", "/v1/completions", msgspec.json.encode(body), headers)

    def read(self, events: int) -> None:
        """Until so many events came."""
        answer = self._http.getresponse()
        assert answer.status == 200
        while events:
            events -= answer.readline().startswith(b"data: {")

    def close(self) -> None:
        """Hang up."""
        self._http.close()


def aborted(cluster: Fleet) -> float:
    """Steps that ended as their caller gave them up, not by themselves."""
    return cluster.metric("decode-0", "tracehaul_worker_steps_aborted_total")


def test_clients_that_hang_up_free_their_steps(cluster: Fleet):
    """In mid-stream, and while waiting for another's memory."""
    before = aborted(cluster)
    with closing(Client(cluster, words(40, "first"), 1500)) as first:
        first.read(5)
        second = Client(cluster, words(40, "second"), 1500)
        wait_until(lambda: cluster.metric("decode-0", "tracehaul_node_waiting") == 1, NOTICED_S)
        assert cluster.metric("decode-0", "tracehaul_node_running") == 1
        second.close()
        wait_until(lambda: aborted(cluster) == before + 1, NOTICED_S)
        assert cluster.metric("decode-0", "tracehaul_node_waiting") == 0
        assert cluster.metric("decode-0", "tracehaul_node_running") == 1
        first.close()
        wait_until(lambda: aborted(cluster) == before + 2, NOTICED_S)
        wait_until(lambda: idle(cluster), NOTICED_S)
        wait_until(lambda: known_idle(cluster), NOTICED_S)


def test_a_client_that_hangs_up_during_prefill_frees_it(cluster: Fleet):
    before, put_before = aborted(cluster), published(cluster)
    with closing(Client(cluster, words(1500, "leaves"), 100)) as client:
        wait_until(lambda: cluster.metric("prefill-0", "tracehaul_node_running") == 1, NOTICED_S)
        client.close()
        wait_until(lambda: aborted(cluster) == before + 1, NOTICED_S)
        wait_until(lambda: idle(cluster), NOTICED_S)
        wait_until(lambda: known_idle(cluster), NOTICED_S)
    assert published(cluster) - put_before < 1500 // BLOCK_TOKENS, "it was not prefilled to its end"


def test_a_router_comes_back_to_a_warm_fleet(cluster: Fleet, alone: Alone):
    agent = Agent(cluster, alone, "router-dies", 250)
    agent.step("decode-0")
    send(cluster, "router-0", signal.SIGKILL)
    cluster.restart(["router-0"])
    wait_until(lambda: len(ready(cluster)) == 4, NOTICED_S)
    agent.cached_step("decode-1")
    agent.cached_step("decode-0")
