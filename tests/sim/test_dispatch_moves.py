"""A step whose worker dies at an awkward moment: the router neither samples anew nor makes up an ending."""

import asyncio

import pytest

from router.dispatch import Dispatch, DispatchConfig
from router.steps import Finished, StepRequest
from sim import loop as virtual
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.hashing import pack_tokens, unpack_tokens
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId
from tracehaul.wire.steps import Sampling, StepDone, StepUsage, Tokens

STOP = 9


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


def run_step(attempts, **sampling):
    async def main():
        network, script = LocalNetwork(), Script(attempts)
        dispatch = Dispatch(Peers(network.at("router:1")), DispatchConfig())
        await network.listen("router:1", dispatch.members)
        await network.listen("decode-0:1", script)
        info = NodeInfo(NodeId("decode-0"), Generation(1), "decode", "decode-0:1", "m", BlockHash(b"r" * 16), 8, 100)
        member = Membership(Peers(network.at("decode-0:1")), "router:1", info, NodeLoad, lambda members: None)
        asyncio.get_running_loop().create_task(member.run())
        await member.joined.wait()
        request = StepRequest(StepId("s"), TraceId("t"), None, [1, 2, 3], Sampling(**sampling))
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
