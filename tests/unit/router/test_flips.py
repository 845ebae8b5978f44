"""Whether a worker may have another role, by what a router sees."""

import msgspec

from router.fleet.flips import View, Worker, goes_back, may_flip
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.ids import Generation, NodeId

COOLDOWN_S = 30.0
NOW_S = 100.0


def worker(name: str, role: str, *, turning: bool = False, live: bool = True, pool: str = "", epoch: int = 0) -> Worker:
    info = NodeInfo(NodeId(name), Generation(1), role, f"{name}:1", engine="native", roles=("prefill", "decode"))  # type: ignore[arg-type]
    return Worker(msgspec.structs.replace(info, pool=pool, role_epoch=epoch), turning, live)


def view(*workers: Worker, stores: int = 1, settled: bool = True, turned_s: dict[str, float] | None = None) -> View:
    return View(workers, stores, settled, turned_s or {})


P0, P1 = worker("p0", "prefill"), worker("p1", "prefill")
D0, D1 = worker("d0", "decode"), worker("d1", "decode")


def why(seen: View, node: str, role: str) -> str:
    return may_flip(seen, NodeId(node), role, NOW_S, COOLDOWN_S) or ""


def test_one_of_two_may() -> None:
    assert why(view(P0, P1, D0), "p0", "decode") == ""
    assert why(view(P0, D0, D1), "d1", "prefill") == ""


def test_the_last_of_a_kind_stays_whoever_else_is_no_help() -> None:
    for other in (
        D0,
        P1._replace(live=False),
        worker("p1", "prefill", pool="other"),
    ):
        assert "last prefill worker" in why(view(P0, other, D1), "p0", "decode")
    assert "last decode worker" in why(view(P0, D0), "d0", "prefill")


def test_one_changes_at_a_time_in_a_pool() -> None:
    turning = worker("d2", "decode", turning=True)
    assert "one changes at a time" in why(view(P0, P1, D0, D1, turning), "p0", "decode")
    assert "is being changed" in why(view(P0, D0, D1, turning), "d2", "prefill")
    assert why(view(P0, P1, D0, turning._replace(info=worker("d2", "decode", pool="b").info)), "p0", "decode") == ""
    # What is about to be something else counts as nothing, also when it is not heard any more.
    lost = turning._replace(live=False)
    assert "one changes" in why(view(P0, D0, lost), "d0", "prefill")


def test_there_is_a_pause_after_each_change() -> None:
    seen = view(P0, P1, D0, turned_s={"": NOW_S - 29.0})
    assert "in 1 s" in why(seen, "p0", "decode")
    assert why(seen._replace(turned_s={"": NOW_S - 30.0}), "p0", "decode") == ""
    assert why(seen._replace(turned_s={"other": NOW_S}), "p0", "decode") == ""


def test_who_cannot_is_not_asked() -> None:
    assert why(view(P0, D0), "p7", "decode") == "there is no worker p7"
    assert "already" in why(view(P0, P1, D0), "p0", "prefill")
    assert "does not serve now" in why(view(P0._replace(live=False), P1, D0), "p0", "decode")
    assert "does not know yet" in why(view(P0, P1, D0, settled=False), "p0", "decode")
    stock = P0._replace(info=msgspec.structs.replace(P0.info, roles=(), engine="vllm"))
    assert "keeps its role: workers of vllm" in why(view(stock, P1, D0), "p0", "decode")
    assert "store" in why(view(P0, D0, D1, stores=0), "d0", "prefill")
    assert why(view(P0, P1, D0, stores=0), "p0", "decode") == ""


def test_where_nobody_decodes_the_last_that_can_may_at_once() -> None:
    assert why(view(P0, turned_s={"": NOW_S}), "p0", "decode") == ""
    assert "last prefill" in why(view(P0, D0._replace(live=False), turned_s={"": NOW_S}), "p0", "decode")


def test_a_pool_without_one_kind_gets_back_who_had_that_role_first() -> None:
    was_d0, was_d1 = worker("d0", "prefill", epoch=1), worker("d1", "prefill", epoch=3)
    assert goes_back(view(was_d0, was_d1, P0)) == ("d0", "decode")
    assert goes_back(view(was_d0._replace(live=False), was_d1, P0)) == ("d1", "decode")
    assert goes_back(view(was_d0, was_d1, P0, settled=False)) is None
    assert goes_back(view(was_d0, was_d1, P0, D0._replace(live=False))) is None, "one is there, and may come back"
    assert goes_back(view(P0, P1)) is None, "none was taken from that role"
    assert goes_back(view(D0, worker("p0", "decode", epoch=1))) == ("p0", "prefill")
    assert goes_back(view(worker("d0", "prefill", epoch=2), P0)) is None, "it is a prefill worker by its config"
