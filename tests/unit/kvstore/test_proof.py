from kvstore.client.proof import RETRY_S, Proof, StoreLife
from tracehaul.wire.ids import Generation, NodeId

A, B = StoreLife(NodeId("store-0"), Generation(1)), StoreLife(NodeId("store-1"), Generation(1))
A2 = StoreLife(NodeId("store-0"), Generation(2))


def test_before_it_is_a_member_it_does_not_serve_and_without_stores_it_does() -> None:
    proof = Proof()
    assert (proof.serving, proof.fault) == (False, "")
    proof.set([], (), 0.0)
    assert (proof.serving, proof.fault, proof.next_s()) == (True, "", None)


def test_it_serves_once_each_store_has_passed() -> None:
    proof = Proof()
    proof.set([A, B], (), 5.0)
    assert proof.due(5.0) == [A, B]
    proof.passed(B)
    assert (proof.serving, proof.due(5.0)) == (False, [A])
    proof.failed(A, "cannot connect to 10.0.0.2:7102", 5.0)
    assert (proof.serving, proof.fault) == (False, "store-0: cannot connect to 10.0.0.2:7102")
    assert (proof.due(5.0 + RETRY_S / 2), proof.next_s()) == ([], 5.0 + RETRY_S)
    assert proof.due(5.0 + RETRY_S) == [A]
    proof.passed(A)
    assert (proof.serving, proof.fault, proof.next_s()) == (True, "", None)


def test_a_store_that_leaves_or_drains_holds_nobody_up() -> None:
    for lives, draining in (([B], ()), ([A, B], (A.node,))):
        proof = Proof()
        proof.set([A, B], (), 0.0)
        proof.passed(B)
        proof.failed(A, "silence", 0.0)
        proof.set(lives, draining, 1.0)
        assert (proof.serving, proof.fault, proof.next_s()) == (True, "", None)


def test_who_served_goes_on_and_tells_of_what_is_new() -> None:
    proof = Proof()
    proof.set([], (), 0.0)
    proof.set([A], (), 1.0)
    assert proof.due(1.0) == [A]
    proof.failed(A, "silence", 1.0)
    assert (proof.serving, proof.fault) == (True, "store-0: silence")
    proof.set([A, B], (), 1.1)
    assert proof.due(1.1) == [B], "a new list hurries nothing"
    proof.set([A2, B], (), 1.2)
    assert (proof.fault, proof.due(1.2)) == ("", [B, A2][::-1]), "another life has another chance"


def test_what_is_told_of_a_life_that_is_no_member_is_of_no_account() -> None:
    proof = Proof()
    proof.set([A2], (), 0.0)
    proof.passed(A)
    proof.failed(A, "silence", 0.0)
    assert (proof.serving, proof.fault, proof.due(0.0)) == (False, "", [A2])
    proof.passed(A2)
    proof.failed(A2, "late news", 0.0)
    assert (proof.serving, proof.fault, proof.next_s()) == (True, "", None)


def test_a_fault_is_told_briefly() -> None:
    proof = Proof()
    lives = [StoreLife(NodeId(f"store-{i}"), Generation(1)) for i in range(9)]
    proof.set(lives, (), 0.0)
    for life in lives:
        proof.failed(life, "x" * 1000, 0.0)
    assert proof.fault.endswith("; and 5 more")
    assert len(proof.fault) < 1000
