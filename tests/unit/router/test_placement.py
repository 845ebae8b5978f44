"""Where steps are put, as tables of cases; and what the figures come from."""

import random
from typing import Any

import msgspec
import pytest

from router.dispatch.inflight import InFlight
from router.dispatch.pooled import Books
from router.fleet.load import Key, Warm, WorkerTable
from router.policy.cost import StoredRun
from router.policy.placement import Ask, Placement, Policy, place, relieves
from sim import loop as virtual
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info
from tracehaul.wire.cluster import ASSUMED, NodeInfo, NodeLoad, Rates, WorkerLimits
from tracehaul.wire.ids import Generation, NodeId, TraceId
from worker.iteration import IterationLoop
from worker.rates import RateMeter, compute_s
from worker.scheduler import Scheduler

G = Generation(7)
RATES = Rates(token_s=1e-3, pair_s=0.0, decode_s=0.02, pull_token_s=1e-5)
STORES = [NodeId("store-0")]
MUCH = 100_000


def fleet(role: str, *changes: dict[str, Any]) -> WorkerTable:
    """A worker for each entry: changed rates, ``free`` tokens of ``kv``, missing tokens that are ``local`` in any
    case."""
    made = WorkerTable()
    limits = [
        WorkerLimits(kv_tokens_max=change.get("kv", 0), local_prefill_tokens=change.get("local", 256))
        for change in changes
    ]
    infos = [NodeInfo(NodeId(f"{role}-{n}"), G, "decode", "x:1", limits=told) for n, told in enumerate(limits)]
    loads = [
        NodeLoad(
            **(RATES._asdict() | {k: v for k, v in change.items() if k not in ("free", "kv", "local")}),
            free_tokens=change.get("free", MUCH),
        )
        for change in changes
    ]
    made.sync(infos, loads)
    return made


def decode(n: int) -> Key:
    return Key(NodeId(f"decode-{n}"), G)


def warm(n: int, tokens: int = 4000, generation: Generation = G) -> Warm:
    return Warm(NodeId(f"decode-{n}"), generation, tokens)


def choose(
    decodes: WorkerTable,
    prefills: WorkerTable | None = None,
    policy: Policy = "cost",
    stores: list[NodeId] = STORES,
    **ask: Any,
) -> Placement:
    step = Ask(TraceId("t"), prompt_tokens=4100, stored=(), warm=None, home=None)
    placed = place(policy, msgspec.structs.replace(step, **ask), decodes, prefills or fleet("prefill"), stores, 0.0)
    assert placed is not None
    return placed


def busy(decodes: WorkerTable, n: int, *, decoding: int = 0, work_s: float = 0.0, each: int = 0) -> WorkerTable:
    """``each``: the tokens of each step that decodes."""
    for _ in range(decoding):
        decodes.sent(decode(n), 0.0, 0.0, each)
        decodes.computed(decode(n), 0.0, 0.0)
    if work_s:
        decodes.sent(decode(n), work_s, 0.0)
    return decodes


def test_no_decode_worker_no_placement() -> None:
    ask = Ask(TraceId("t"), 10, (), None, None)
    assert place("cost", ask, fleet("decode"), fleet("prefill", {}), STORES, 0.0) is None


@pytest.mark.parametrize(
    ("ask", "work", "chosen", "reason"),
    [
        ({"warm": warm(1)}, {}, 1, "warm"),
        # 100 tokens at 1 ms are to be computed: a little waiting is worth the pull that it saves.
        ({"warm": warm(1), "stored": [StoredRun(4000, 0.0)]}, {"work_s": 0.03}, 1, "warm"),
        ({"warm": warm(1), "stored": [StoredRun(4000, 0.0)]}, {"work_s": 2.0}, 0, "cheaper than its own worker"),
        # What is in no store costs 4 s elsewhere.
        ({"warm": warm(1)}, {"work_s": 2.0}, 1, "warm"),
        ({"warm": warm(1)}, {"work_s": 9.0}, 0, "cheaper than its own worker"),
        ({"warm": warm(1), "stored": [StoredRun(4000, 0.0)]}, {"decoding": 3}, 0, "cheaper than its own worker"),
        ({"warm": warm(1, generation=Generation(1))}, {"work_s": 1.0}, 0, "its worker is gone"),
        ({"warm": warm(1), "avoided": frozenset([decode(1)])}, {}, 0, "its worker failed it"),
        ({"avoided": frozenset([decode(0), decode(1)])}, {"work_s": 1.0}, 0, "cheapest"),
        ({"warm": warm(1), "asked": NodeId("decode-0")}, {}, 0, "asked for"),
        ({"warm": warm(1), "asked": NodeId("decode-9")}, {}, 1, "warm"),
    ],
)
def test_a_trace_stays_where_its_context_is_while_that_pays(
    ask: dict[str, Any], work: dict[str, Any], chosen: int, reason: str
) -> None:
    placed = choose(busy(fleet("decode", {}, {}), 1, **work), **ask)
    assert (placed.decode, placed.reason) == (decode(chosen), reason)


def test_nodes_of_different_speed_get_what_they_do_best() -> None:
    slow, fast = {"token_s": 4e-3, "decode_s": 0.08}, {}
    assert choose(fleet("decode", slow, fast)).decode == decode(1)
    assert choose(busy(fleet("decode", slow, fast), 1, work_s=60.0)).decode == decode(0)
    poor_link = {"pull_token_s": 1e-3}
    assert choose(fleet("decode", poor_link, {}), stored=[StoredRun(4064, 0.0)]).decode == decode(1)


def test_who_would_push_others_out_is_charged_for_it() -> None:
    full, roomy = {"free": 100, "pull_token_s": 1e-4}, {"pull_token_s": 1e-4}
    assert choose(fleet("decode", full, roomy), stored=[StoredRun(4064, 0.0)]).decode == decode(1)


@pytest.mark.parametrize(
    ("ask", "helper_work_s", "decoding", "helps", "computed_there"),
    [
        ({}, 0.0, 0, True, True),  # 4 s of computing: a prefill worker is for that
        ({}, 9.0, 0, False, False),  # it would begin too late
        ({}, 9.0, 8, True, True),  # but here eight streams would stand still
        (
            {"stored": [StoredRun(4064, 0.0)]},
            0.0,
            0,
            True,
            False,
        ),  # the decode worker's own rule: a short rest is its own
        ({"warm": warm(0, 4090)}, 0.0, 8, True, False),
    ],
)
def test_what_is_missing_is_computed_where_it_costs_least(
    ask: dict[str, Any], helper_work_s: float, decoding: int, helps: bool, computed_there: bool
) -> None:
    prefills = fleet("prefill", {})
    if helper_work_s:
        prefills.sent(prefills.keys[0], helper_work_s, 0.0)
    placed = choose(busy(fleet("decode", {}), 0, decoding=decoding), prefills, **ask)
    assert (placed.prefill is not None, placed.prefill_work_s > 0) == (helps, computed_there)
    assert (placed.decode_work_s > 0) != computed_there


@pytest.mark.parametrize(
    ("stored", "ask", "pulled", "computed_s"),
    [
        ([StoredRun(4064, 0.0)], {}, None, 0.036),  # 40 ms of pulling instead of 4 s of computing
        ([StoredRun(4064, 2e-3)], {}, 0, 4.1),  # it would come up at half the speed of computing it
        ([StoredRun(2048, 0.0), StoredRun(4064, 2e-3)], {}, 2048, 2.052),
        ([StoredRun(2048, 0.0), StoredRun(4064, 5e-4)], {}, None, 0.036),
        ([StoredRun(2048, 2e-3), StoredRun(4064, 0.0)], {}, None, 0.036),  # of what follows nothing is of use alone
        ([StoredRun(3000, 5e-3), StoredRun(4064, 0.0)], {"warm": warm(0, 3200)}, None, 0.036),
        ([StoredRun(4064, 9e-4)], {}, None, 0.036),  # hardly slower than pulling: the estimate may be wrong
    ],
)
def test_blocks_that_come_up_slower_than_they_are_computed_are_computed(
    stored: list[StoredRun], ask: dict[str, Any], pulled: int | None, computed_s: float
) -> None:
    placed = choose(fleet("decode", {}), stored=stored, **ask)
    assert (placed.pull_tokens, placed.decode_work_s) == (pulled, pytest.approx(computed_s))
    assert placed.expected_tokens == (4064 if pulled is None else pulled)


def test_what_a_prefill_worker_computes_follows_all_that_is_stored() -> None:
    slow = [StoredRun(2048, 1e-4)]
    placed = choose(fleet("decode", {}), fleet("prefill", {}), stored=slow)
    assert (placed.pull_tokens, placed.prefill_work_s) == (None, pytest.approx(2.052))


def test_without_a_store_no_prefill_worker_is_asked_and_nothing_stored_counts() -> None:
    placed = choose(fleet("decode", {}), fleet("prefill", {}), stores=[], stored=[StoredRun(4064, 0.0)])
    assert (placed.prefill, placed.home, placed.expected_tokens) == (None, None, 0)
    assert placed.decode_work_s == pytest.approx(4.1)


def test_siblings_go_to_the_prefill_worker_that_computes_their_prefix() -> None:
    prefills = fleet("prefill", {}, {}, {})
    first = choose(fleet("decode", {}, {}), prefills)
    assert first.helper is not None
    prefills.sent(first.helper, first.prefill_work_s, 0.0)
    second = choose(fleet("decode", {}, {}), prefills, predicted={first.helper.node: 4096})
    assert second.helper == first.helper, "waiting for 4 s of work beats doing it again elsewhere"
    assert second.prefill_work_s < 0.01
    other = choose(fleet("decode", {}, {}), prefills, trace=TraceId("u"))
    assert other.helper != first.helper


def test_eight_siblings_wait_for_one_computation_of_their_prefix() -> None:
    prefills = fleet("prefill", {}, {})
    chosen: list[Key | None] = []
    for child in range(8):
        predicted = {chosen[0].node: 4096} if chosen and chosen[0] is not None else {}
        placed = choose(
            fleet("decode", {}, {}), prefills, trace=TraceId(f"t{child}"), prompt_tokens=4144, predicted=predicted
        )
        assert placed.helper is not None
        prefills.sent(placed.helper, placed.prefill_work_s, 0.0)
        chosen.append(placed.helper)
    assert len(set(chosen)) == 1
    busy_there = choose(fleet("decode", {}, {}), prefills, predicted={chosen[0].node: 512} if chosen[0] else {})
    assert busy_there.helper not in chosen, "a short prefix is not worth that"


def test_siblings_go_where_a_decode_worker_computes_their_prefix() -> None:
    decodes, prefills = fleet("decode", {"token_s": 5e-4}, {"token_s": 1.2e-3}), fleet("prefill", {})
    first = choose(decodes, prefills, prompt_tokens=4144)
    assert (first.decode, first.computes) == (decode(0), "decode-0"), "it is twice as fast"
    decodes.sent(first.decode, first.decode_work_s, 0.0)
    for child in range(7):
        placed = choose(
            decodes, prefills, trace=TraceId(f"t{child}"), prompt_tokens=4144, predicted={first.decode.node: 4096}
        )
        assert (placed.decode, placed.computes) == (decode(0), "decode-0")
        assert placed.decode_work_s == pytest.approx(48 * 5e-4)
        decodes.sent(placed.decode, placed.decode_work_s, 0.0)


def test_the_rules_to_compare_with() -> None:
    decodes = busy(fleet("decode", {}, {}, {}), 1, decoding=5)
    turns = [choose(decodes, policy="round-robin", warm=warm(0), turn=n).decode for n in range(4)]
    assert turns == [decode(0), decode(1), decode(2), decode(0)]
    sticky = choose(decodes, policy="sticky", warm=warm(1), stored=[StoredRun(4064, 0.0)])
    assert (sticky.decode, sticky.reason) == (decode(1), "warm")
    fresh = {choose(decodes, policy="sticky", trace=TraceId(f"t{n}")).decode for n in range(20)}
    assert fresh == {decode(0), decode(2)}
    gone = choose(decodes, policy="sticky", warm=warm(9))
    assert gone.reason == "its worker is gone"


def test_idle_workers_share_traces() -> None:
    decodes = fleet("decode", {}, {}, {}, {})
    chosen = [choose(decodes, trace=TraceId(f"t{n}")).decode for n in range(80)]
    assert all(10 <= chosen.count(key) <= 30 for key in decodes.keys)


def test_a_fleet_keeps_its_books_while_members_come_and_go() -> None:
    decodes = fleet("decode", {}, {})
    flights: list[InFlight] = []
    chance = random.Random(3)
    for n in range(40):
        placed = choose(decodes, fleet("prefill", {}), trace=TraceId(f"t{n}"), prompt_tokens=200)
        book = Books()
        book.decodes, book.prefills = decodes, fleet("prefill")
        flights.append(InFlight((book,), placed, float(n), 200))
        if n == 20:
            infos = [NodeInfo(key.node, G, "decode", "y:1") for key in decodes.keys]
            decodes.sync(infos[:1], [NodeLoad()])
            decodes.sync(infos, [NodeLoad(), NodeLoad()])
        if chance.random() < 0.5:
            flights[chance.randrange(len(flights))].token(float(n))
        if chance.random() < 0.3:
            flights.pop(chance.randrange(len(flights))).ended()
        assert sum(decodes.running(key) for key in decodes.keys) == len(flights) == decodes.running_steps.sum()
    for flight in flights:
        flight.ended()
    assert decodes.running_steps.sum() == decodes.decoding.sum() == 0
    assert decodes.queue_s(50.0).sum() == 0


def test_a_queue_empties_as_time_passes_and_what_is_overdue_is_not_done() -> None:
    decodes = fleet("decode", {})
    decodes.sent(decode(0), 4.0, now_s=10.0)
    decodes.sent(decode(0), 6.0, now_s=10.0)
    assert decodes.queue_s(10.0)[0] == pytest.approx(10.0)
    assert decodes.queue_s(13.0)[0] == pytest.approx(7.0)
    assert decodes.queue_s(30.0)[0] == pytest.approx(3.0)
    decodes.computed(decode(0), 4.0, now_s=31.0)
    assert decodes.queue_s(31.0)[0] == pytest.approx(6.0), "only now the second one began"
    decodes.ended(decode(0), 6.0, computed=False)
    assert decodes.queue_s(32.0)[0] == 0


def test_what_ends_without_having_computed_says_nothing_of_what_is_under_way() -> None:
    decodes = fleet("decode", {})
    for work_s in (8.0, 6.0, 0.0):
        decodes.sent(decode(0), work_s, now_s=0.0)
    decodes.computed(decode(0), 0.0, now_s=5.0)  # another worker's prompt
    assert decodes.queue_s(5.0)[0] == pytest.approx(9.0)
    decodes.ended(decode(0), 6.0, computed=False)
    assert decodes.queue_s(5.0)[0] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("wait_s", "waited_s", "moves"), [(4.5, 0.0, False), (6.0, 0.0, True), (4.5, 2.0, True), (1.5, 60.0, False)]
)
def test_a_step_leaves_its_queue_for_a_clearly_cheaper_place(wait_s: float, waited_s: float, moves: bool) -> None:
    other = choose(fleet("decode", {}), prompt_tokens=2700)
    assert round(other.cost_s, 1) == 4.0
    assert relieves(other, wait_s, waited_s) == moves


def test_a_prefill_worker_that_a_step_has_left_is_not_chosen() -> None:
    decodes, prefills = busy(fleet("decode", {}), 0, work_s=10.0), fleet("prefill", {}, {})
    helpers = [Key(NodeId(f"prefill-{n}"), G) for n in range(2)]
    assert choose(decodes, prefills, left=frozenset(helpers[:1])).helper == helpers[1]
    assert choose(decodes, prefills, left=frozenset(helpers)).helper is None


@pytest.mark.parametrize(
    ("shared", "running", "free", "helped"),
    [(0.0, 1, MUCH, True), (1.0, 0, MUCH, True), (1.0, 1, MUCH, False), (1.0, 1, 1000, True)],
)
def test_who_shares_cores_with_busy_workers_helps_only_if_that_is_worth_it(
    shared: float, running: int, free: int, helped: bool
) -> None:
    prefills = fleet("prefill", {"shared": shared})
    decodes = busy(fleet("decode", {"free": free}, {"free": free}), 0, decoding=running)
    assert (choose(decodes if running == 0 else busy(decodes, 1, work_s=1.0), prefills).helper is not None) == helped


def iterate(meter: RateMeter, true: Rates, contexts: list[int], times: int, noise: float = 0.0) -> None:
    chance = random.Random(5)
    for n in range(times):
        length = contexts[n % len(contexts)]
        seconds = compute_s(true, length, length + 512) * (1 + noise * chance.uniform(-1, 1))
        meter.iterated([(length, 512)], seconds)


@pytest.mark.parametrize("speed", [0.001, 1.0, 30.0])
def test_rates_are_learned_from_what_is_done(speed: float) -> None:
    true = Rates(2e-4 * speed, 4e-7 * speed, 0.005, 1e-6)
    meter = RateMeter()
    iterate(meter, true, [0, 512, 4096, 16384], 60, noise=0.1)
    for start, end in ((0, 2000), (3000, 3100), (0, 16000)):
        assert compute_s(meter.rates, start, end) == pytest.approx(compute_s(true, start, end), rel=0.2)


def test_a_worker_that_saw_no_long_context_scales_what_was_assumed() -> None:
    true = Rates(ASSUMED.token_s / 10, ASSUMED.pair_s / 10, 0.005, 1e-6)
    meter = RateMeter()
    iterate(meter, true, [0], 30)
    assert meter.rates.pair_s == pytest.approx(true.pair_s, rel=0.3)


def test_rates_follow_a_worker_that_became_slower_and_never_turn_negative() -> None:
    meter = RateMeter()
    fast, slow = Rates(1e-4, 0.0, 0.01, 1e-6), Rates(1e-3, 0.0, 0.01, 1e-6)
    iterate(meter, fast, [0, 2048], 100)
    assert 0 < meter.rates.pair_s < 1e-7
    iterate(meter, slow, [0, 2048], 100)
    assert compute_s(meter.rates, 0, 1000) == pytest.approx(1.0, rel=0.2)


def test_decoding_and_pulling_are_means_that_forget() -> None:
    meter = RateMeter()
    for _ in range(100):
        meter.iterated([(100, 1), (50, 1)], 0.004)
        meter.pulled(1000, 0.002, 0.0)
    assert meter.rates.decode_s == pytest.approx(0.004)
    assert meter.rates.pull_token_s == pytest.approx(2e-6, rel=0.01)
    for _ in range(100):
        meter.pulled(1000, 0.02, 0.0)
    assert meter.rates.pull_token_s == pytest.approx(2e-5, rel=0.05)
    before = meter.rates
    meter.pulled(0, 9.0, 0.0)
    meter.iterated([], 1.0)
    meter.iterated([(0, 1), (0, 3)], 1.0)
    assert meter.rates == before, "too little to learn from"


def test_a_slow_pull_is_not_the_last_and_many_are_believed_for_longer() -> None:
    once, always = RateMeter(), RateMeter()
    once.pulled(600, 9.0, 99.0)  # maps memory
    assert once.rates.pull_token_s == ASSUMED.pull_token_s
    once.pulled(600, 0.3, 100.0)
    assert once.rates.pull_token_s > 1e-4
    for at in range(10):
        always.pulled(20_000, 10.0, 91.0 + at)
    for now_s in range(100, 201):
        once.aged(now_s)
        always.aged(now_s)
    assert once.rates.pull_token_s < 2 * ASSUMED.pull_token_s
    assert always.rates.pull_token_s > 2e-4
    always.aged(500.0)
    assert always.rates.pull_token_s < 2 * ASSUMED.pull_token_s


@pytest.mark.parametrize("kv_tokens", [4, 600, 4096])
def test_a_worker_measures_its_engine_at_its_start(kv_tokens: int) -> None:
    engine = FakeEngine(
        fake_info(kv_tokens_max=kv_tokens, context_max=4096), EngineCost(iteration_s=0.004, prefill_token_s=1e-3)
    )
    loop = IterationLoop(engine, Scheduler(512, 64), engine.grow)
    virtual.run(lambda: loop.calibrate(256))
    engine.check()
    assert engine.free_tokens == kv_tokens
    if kv_tokens > 4:
        assert compute_s(loop.meter.rates, 0, 512) == pytest.approx(0.52, rel=0.2)
        assert loop.meter.rates.decode_s == pytest.approx(0.004)
