"""An operator changes a worker's role over HTTP."""

from router.adapt.loop import Change
from router.adapt.story import Noted
from router.calls.fakes import FakeDispatcher, say
from router.fleet.members import NodeStatus
from tests.unit.router.http.test_access import BETA, BOSS, Send, served
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.ids import Generation, NodeId

PATH = "/cluster/decode-1/role"


def dispatcher() -> FakeDispatcher:
    made = FakeDispatcher(say("hi"))
    info = NodeInfo(NodeId("decode-1"), Generation(1), "decode", "decode-1:1")
    made.statuses = [NodeStatus(info, NodeLoad(), "ready", 0.1)]
    return made


def test_a_role_is_changed_and_what_came_of_it_told() -> None:
    async def use(send: Send) -> None:
        answer = await send(BOSS, "POST", PATH, {"role": "prefill"})
        assert answer.status_code == 200
        assert answer.json() == {"node": "decode-1", "role": "prefill", "flipped": True, "why": "", "seconds": 0.5}
        made.why_not_flipped = "decode-1 is the last decode worker that serves"
        refused = await send(BOSS, "POST", PATH, {"role": "prefill"})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (409, "role_not_changed")
        assert error["message"] == made.why_not_flipped

    made = dispatcher()
    served(use, dispatcher=made)
    assert made.flips == 2 * [("decode-1", "prefill")]


def test_who_may_not_steer_or_says_nonsense_changes_nothing() -> None:
    async def use(send: Send) -> None:
        assert (await send(BETA, "POST", PATH, {"role": "prefill"})).status_code == 403
        assert (await send(None, "POST", PATH, {"role": "prefill"})).status_code == 401
        assert (await send(BOSS, "POST", "/cluster/store-9/role", {"role": "prefill"})).status_code == 404
        for body in ({"role": "store"}, {"role": ""}, {}, {"role": "prefill", "now": True}, [], None):
            assert (await send(BOSS, "POST", PATH, body)).status_code == 400, body
        assert (await send(BOSS, "GET", PATH)).status_code == 405

    made = dispatcher()
    served(use, dispatcher=made)
    assert made.flips == []


def test_what_was_changed_at_a_node_is_told_to_who_may_steer() -> None:
    async def use(send: Send) -> None:
        answer = await send(BOSS, "GET", "/cluster/decode-1/changes")
        assert answer.status_code == 200
        assert answer.json()["changes"] == [{"at_s": 5.0, "pool": "", "what": asked}]
        assert (await send(BETA, "GET", "/cluster/decode-1/changes")).status_code == 403
        assert (await send(BOSS, "GET", "/cluster/decode-9/changes")).status_code == 404

    made = dispatcher()
    change = Change(1, NodeId("decode-1"), "prefill", 0.25, quicker=False, inputs={"rate": 2.0})
    asked = {"type": "change", "number": 1, "node": "decode-1", "role": "prefill", "foretold": 0.25, "quicker": False}
    asked |= {"inputs": {"rate": 2.0}, "undoes": None, "hoped": False}
    made.noted = [
        Noted(5.0, "", change),
        Noted(6.0, "", Change(2, NodeId("d2"), "decode", 0.2, quicker=False, inputs={})),
    ]
    served(use, dispatcher=made)
