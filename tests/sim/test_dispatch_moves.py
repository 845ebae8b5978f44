"""A step whose worker dies at an awkward moment: the router neither samples anew nor makes up an ending."""

import asyncio

import msgspec
import pytest

from router.dispatch.config import DispatchConfig
from router.dispatch.dispatch import Dispatch
from router.dispatch.steps import Finished, StepRequest
from router.traces.decisions import Replaced
from sim import loop as virtual
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import CannotContinue, InvalidRequest, PeerLost
from tracehaul.wire.hashing import pack_tokens, unpack_tokens
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId
from tracehaul.wire.steps import Constraint, Sampling, StepDone, StepUsage, Tokens

STOP = 9
ROOT = BlockHash(b"r" * 16)


class Script:
    """A decode worker that sends scripted tokens, one list an attempt, then dies or ends."""

    def __init__(self, attempts):
        self.attempts = list(attempts)
        self.emitted = []

    async def call(self, request, context):
        return Ok()

    async def stream(self, request, context):
        self.emitted.append(unpack_tokens(request.emitted))
        tokens, computed_from, dies = self.attempts.pop(0)
        usage = StepUsage(prompt_tokens=3, output_tokens=1, computed_from=computed_from)
        for index, token in enumerate(tokens):
            yield Tokens(pack_tokens([token]), usage if index == 0 else None)
        if dies:
            raise PeerLost("killed")
        yield StepDone("length", usage, 0)

    def disconnected(self, peer):
        pass


def run_step(attempts, lacks=(), features=(), **sampling):
    async def main():
        network, script = LocalNetwork(), Script(attempts)
        dispatch = Dispatch(Peers(network.at("router:1")), DispatchConfig())
        await network.listen("router:1", dispatch.members)
        await network.listen("decode-0:1", script)
        info = NodeInfo(NodeId("decode-0"), Generation(1), "decode", "decode-0:1", "m", ROOT, 8, 100)
        info = msgspec.structs.replace(info, lacks=lacks, features=features)
        member = Membership(Peers(network.at("decode-0:1")), ["router:1"], info, NodeLoad, lambda members: None)
        asyncio.get_running_loop().create_task(member.run())
        await member.joined.wait()
        request = StepRequest(StepId("s"), TraceId("t"), None, pack_tokens([1, 2, 3]), Sampling(**sampling))
        output, done = [], []
        async for event in dispatch.run(request):
            if isinstance(event, Finished):
                done.append(event)
            else:
                output += event.tokens
        return output, done, script.emitted

    return virtual.run(main)


def test_a_lost_terminal_message_does_not_sample_beyond_the_end():
    output, [done], asked = run_step([([5, 6], 0, True)], max_tokens=2)
    assert (output, done.reason, asked) == ([5, 6], "length", [[]])
    assert done.usage.output_tokens == 2
    output, [done], asked = run_step([([5, STOP], 0, True)], max_tokens=8, stop_tokens=(STOP,))
    assert (output, done.reason, asked) == ([5, STOP], "stop", [[]])


@pytest.mark.parametrize("later", [2, 3])
def test_a_moved_step_does_not_count_its_own_work_as_cached(later):
    output, [done], asked = run_step([([5], 1, True), ([6], later, False)], max_tokens=2)
    assert (output, asked) == ([5, 6], [[], [5]])
    assert done.usage.computed_from == 1


def test_where_the_rest_of_an_answer_would_differ_it_ends_aloud_and_what_was_not_begun_runs_anew():
    lost = [([5], 0, True), ([6], 0, False)]
    how = {"max_tokens": 2, "lacks": ("seeds", "penalties", "constraints")}
    for sampling in (
        {"seed": 7},
        {"temperature": 0.0, "frequency_penalty": 0.5},
        {"temperature": 0.0, "constraint": Constraint("regex", "ab"), "features": ("constraints",)},
    ):
        with pytest.raises(CannotContinue):
            run_step(lost, **how, **sampling)
        output, _, asked = run_step([([], 0, True), ([5, 6], 0, False)], **how, **sampling)
        assert (output, asked) == ([5, 6], [[], []])
    for sampling in ({"temperature": 0.0}, {"seed": 7, "seeded": False}):
        output, _, asked = run_step(lost, **how, **sampling)
        assert (output, asked) == ([5, 6], [[], [5]])


def test_what_no_worker_can_do_is_refused_before_anything_runs():
    with pytest.raises(InvalidRequest, match="no worker of 'm' keeps an answer"):
        run_step([], max_tokens=2, constraint=Constraint("regex", "ab"))


class Queues:
    """A decode worker whose steps wait as long as told, by who computes their prompts."""

    def __init__(self):
        self.seen = []

    async def stream(self, request, context):
        self.seen.append((request.trace, request.prefill))
        await asyncio.sleep(2.0 if request.prefill is None else 1000.0)
        usage = StepUsage(prompt_tokens=3, output_tokens=1, computed_from=64)
        yield Tokens(pack_tokens([5]), usage)
        yield StepDone("length", usage, 0)

    async def call(self, request, context):
        return Ok()

    def disconnected(self, peer):
        pass


def test_a_prompt_that_waits_goes_to_a_worker_that_has_become_idle():
    async def main():
        network, worker = LocalNetwork(), Queues()
        dispatch = Dispatch(Peers(network.at("router:1")), DispatchConfig(idle_timeout_s=2000.0))
        await network.listen("router:1", dispatch.members)
        await network.listen("decode-0:1", worker)
        rates = NodeLoad(token_s=1e-3, decode_s=0.02, pull_token_s=1e-6, free_tokens=100_000)
        for role in ("decode", "prefill", "store"):
            info = NodeInfo(NodeId(f"{role}-0"), Generation(1), role, f"{role}-0:1", "m", ROOT, 8, 100_000)
            member = Membership(
                Peers(network.at(info.address)), ["router:1"], info, lambda: rates, lambda members: None
            )
            asyncio.get_running_loop().create_task(member.run())
            await member.joined.wait()

        async def step(trace, tokens):
            request = StepRequest(
                StepId(f"{trace}-1"), TraceId(trace), None, pack_tokens([ord(trace)] * tokens), Sampling(1)
            )
            return [event async for event in dispatch.run(request)]

        steps = []
        for trace, tokens in (("a", 8000), ("b", 12000), ("c", 8000), ("d", 8000)):
            steps.append(asyncio.create_task(step(trace, tokens)))
            await asyncio.sleep(0.01)
        await asyncio.wait(steps, timeout=10.0)
        replaced = [
            entry.decision
            for entry in dispatch.traces.get(("", TraceId("d"))).decisions
            if isinstance(entry.decision, Replaced)
        ]
        cached = [task.result()[-1].usage.computed_from if task.done() else None for task in steps]
        for task in steps:
            task.cancel()
        await asyncio.gather(*steps, return_exceptions=True)
        await dispatch.close()
        pool = dispatch.pools[""]
        return worker.seen, replaced, cached, pool.all.prefills.total, pool.all.decodes.total

    seen, [replaced], cached, *left = virtual.run(main)
    # b is done in 2 of the 12 seconds that it was expected to take, and decode-0 has nothing to do: it takes d, and
    # after it c. Only a is left, which prefill-0 is thought to compute.
    assert seen[:4] == [("a", "prefill-0"), ("b", None), ("c", "prefill-0"), ("d", "prefill-0")]
    assert seen[4:] == [("d", None), ("c", None)]
    assert replaced.worker == "prefill-0"
    assert replaced.cost_s < replaced.wait_s
    # What is found after a move may be what the attempt before it has left; b was given one place only.
    assert cached == [None, 64, 0, 0]
    assert left == [0, 0]
