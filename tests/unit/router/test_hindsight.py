"""Decisions made anew: by the same policy the same ones, by another one what it would have chosen, and followed."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.cli import commands
from cluster.decision_file import FILE_BYTES_MAX, DecisionFile, PricedLine, log_of
from cluster.rundir import ClusterFault
from cluster.whatif import whatif
from router.fleet.load import Key, Warm, WorkerTable
from router.policy.cost import StoredRun
from router.policy.hindsight import ROWS_MAX, Ended, Priced, priced, summary, through
from router.policy.knobs import DEFAULT, Knobs
from router.policy.placement import Ask, Policy, place
from router.traces.decisions import Ended as StepEnded
from router.traces.decisions import Entry
from tests.unit.router.test_placement import STORES, busy, decode, fleet
from tracehaul.wire.ids import StepId, TraceId

SALT = ""


def logged(
    decodes: WorkerTable,
    prefills: WorkerTable,
    step: str = "s",
    trace: str = "t",
    policy: Policy = "cost",
    knobs: Knobs = DEFAULT,
    at_s: float = 0.0,
    **ask: object,
) -> Priced:
    """A decision as a router writes it down, read again."""
    asked = msgspec.structs.replace(Ask(TraceId(trace), 4100, (), None, None), **ask)
    placement = place(policy, asked, decodes, prefills, STORES, at_s, knobs)
    assert placement is not None
    one = priced(StepId(step), asked, policy, decodes, prefills, STORES, at_s, placement, knobs)
    return msgspec.json.decode(msgspec.json.encode(one), type=Priced)


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.floats(0.0, 9.0), st.integers(0, 9000), st.integers(0, 9000)),
        min_size=1,
        max_size=5,
    ),
    st.lists(st.floats(0.0, 9.0), max_size=3),
    st.sampled_from(["cost", "sticky"]),
    st.integers(0, 4000),
    st.integers(0, 5),
    st.floats(0.0, 1.0),
    st.integers(1, 900),
)
def test_what_is_written_down_is_enough_to_choose_the_same_again(
    workers: list[tuple[int, float, int, int]],
    helpers: list[float],
    policy: Policy,
    stored: int,
    at: int,
    margin: float,
    output: int,
) -> None:
    decodes = fleet("decode", *({"free": free, "kv": 9000} for _, _, free, _ in workers))
    for number, (decoding, work_s, _, each) in enumerate(workers):
        busy(decodes, number, decoding=decoding, work_s=work_s, each=each)
    prefills = fleet("prefill", *({} for _ in helpers))
    for number, work_s in enumerate(helpers):
        prefills.sent(Key(decode(number).node.replace("decode", "prefill"), decode(number).generation), work_s, 0.0)  # type: ignore[arg-type]
    runs = [StoredRun(stored, 1e-4)] if stored else []
    warm = Warm(decode(at).node, decode(at).generation, stored)
    more = {"stored": runs, "warm": warm, "output_tokens": float(output)}
    one = logged(decodes, prefills, policy=policy, knobs=Knobs(sticky_margin=margin), **more)
    (redone,) = through([(SALT, one)], policy, {})
    assert redone.again
    assert not redone.differs
    assert redone.would.cost_s == pytest.approx(redone.was.cost_s, rel=1e-4)


def test_another_margin_keeps_a_trace_with_its_worker() -> None:
    decodes = busy(fleet("decode", {}, {}), 0, decoding=12)
    one = logged(decodes, fleet("prefill"), stored=[StoredRun(4000, 0.0)], warm=Warm(*decode(0), 4000))
    assert one.placement.decode == decode(1)
    (kept,) = through([(SALT, one)], "cost", {"sticky_margin": 0.9})
    (stuck,) = through([(SALT, one)], "sticky", {})
    assert kept.would.decode == stuck.would.decode == decode(0)
    assert kept.differs
    assert kept.would.cost_s > kept.was.cost_s


def test_a_trace_is_followed_to_where_the_other_policy_would_have_put_it() -> None:
    first = logged(fleet("decode", {}, {}), fleet("prefill"), "s1", stored=[])
    here = first.placement.decode
    there = next(key for key in (decode(0), decode(1)) if key != here)
    loaded = fleet("decode", {}, {})
    for _ in range(12):
        loaded.sent(here, 0.0, 0.0)
        loaded.computed(here, 0.0, 0.0)
    second = logged(loaded, fleet("prefill"), "s2", stored=[StoredRun(4000, 0.0)], warm=Warm(*here, 4000))
    third = logged(
        fleet("decode", {}, {}), fleet("prefill"), "s3", stored=[StoredRun(4000, 0.0)], warm=Warm(*there, 4050)
    )
    assert (second.placement.decode, third.placement.decode) == (there, there)
    log = [
        (SALT, first),
        (SALT, Ended(StepId("s1"), 10)),
        (SALT, second),
        (SALT, Ended(StepId("s2"), 10)),
        (SALT, third),
    ]
    redone = through(log, "sticky", {})
    assert [one.would.decode for one in redone] == [here, here, here]
    assert [one.would.reason for one in redone][1:] == ["warm", "warm"]
    assert summary(redone, would=True).stays == 1.0
    assert summary(redone, would=False).stays < 1.0


def test_what_would_run_elsewhere_is_work_there_until_it_has_ended() -> None:
    prefills = fleet("prefill")
    log: list[tuple[str, Priced | Ended]] = []
    decodes = fleet("decode", {}, {})
    for number in range(6):  # all on one worker, as if its caller had wanted that
        one = logged(decodes, prefills, f"s{number}", f"t{number}", asked=decode(0).node)
        log.append((SALT, one))
        decodes.sent(decode(0), one.placement.decode_work_s, 0.0, one.ask.prompt_tokens)
    free = [(salt, msgspec.structs.replace(one, ask=msgspec.structs.replace(one.ask, asked=None))) for salt, one in log]  # type: ignore[arg-type]
    spread = summary(through(free, "cost", {}), would=True)
    assert spread.busiest == 0.5
    over: list[tuple[str, Priced | Ended]] = []
    for salt, one in free:
        over += [(salt, one), (salt, Ended(one.step, 1))]
    assert all(one.would.decode == decode(1) for one in through(over, "cost", {})[1:])


def test_of_many_workers_the_least_loaded_and_the_chosen_are_written_down() -> None:
    many = fleet("decode", *({} for _ in range(3 * ROWS_MAX)))
    for number in range(3 * ROWS_MAX - 1):
        busy(many, number, decoding=1 + number % 3)
    one = logged(many, fleet("prefill"), stored=[StoredRun(4000, 0.0)], warm=Warm(*decode(2), 4000))
    names = {row.key for row in one.decodes}
    assert len(names) <= ROWS_MAX + 2
    assert {one.placement.decode, decode(2), decode(3 * ROWS_MAX - 1)} <= names
    (redone,) = through([(SALT, one)], "cost", {})
    assert redone.again


def test_a_log_is_read_with_its_torn_lines_left_out(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    decodes = busy(fleet("decode", {}, {}), 0, decoding=12)
    one = logged(decodes, fleet("prefill"), "s1", stored=[StoredRun(4000, 0.0)], warm=Warm(*decode(0), 4000))

    async def main() -> None:
        file = DecisionFile(path)
        file.write_priced((SALT, TraceId("t")), one)
        file.write((SALT, TraceId("t")), Entry(1.0, StepEnded(StepId("s1"), "stop", 4100, 10, 1.0, None)))
        file.close()

    asyncio.run(main())
    with path.open("ab") as file:
        file.write(b'{"at_s":1,"trace":"t","decision":{"type":"priced","step":7}}\nnothing\n{"at_s":1,"tra')
    assert list(log_of(path)) == [(SALT, one), (SALT, Ended(StepId("s1"), 10))]
    assert path.stat().st_size < FILE_BYTES_MAX
    found = whatif(path, "sticky")
    assert (found.steps, found.elsewhere, found.again) == (1, 1, 1)
    assert (found.was.stays, found.would.stays) == (0.0, 1.0)
    with pytest.raises(ClusterFault, match="cannot be read"):
        whatif(tmp_path / "none", "cost")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ClusterFault, match="has no decision"):
        whatif(tmp_path / "empty", "cost")


def test_the_command_shows_both_sides_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    decodes = busy(fleet("decode", {}, {}), 0, decoding=12)
    one = logged(decodes, fleet("prefill"), "s1", stored=[StoredRun(4000, 0.0)], warm=Warm(*decode(0), 4000))
    path = tmp_path / "log"
    path.write_bytes(msgspec.json.encode(PricedLine(1.0, TraceId("t"), one)))
    shown = CliRunner().invoke(commands("whatif"), ["whatif", str(path), "--policy", "sticky"])
    assert shown.exit_code == 0
    assert "1 of 1 steps (100.0 %) would have gone elsewhere" in shown.output
    assert "decode-1" in shown.output
    found = msgspec.json.decode(
        CliRunner().invoke(commands("whatif"), ["whatif", str(path), "--sticky-margin", "0.9", "--json"]).output
    )
    assert (found["elsewhere"], found["most"][0]["would"]["decode"][0]) == (1, "decode-0")
    refused = CliRunner().invoke(commands("whatif"), ["whatif", str(path), "--policy", "best"])
    assert isinstance(refused.exception, ClusterFault)


def test_what_a_router_of_another_version_wrote_down_is_left_out() -> None:
    one = logged(fleet("decode", {}), fleet("prefill", {}))
    short = [row._replace(figures=row.figures[:-1]) for row in one.decodes]
    assert through([(SALT, msgspec.structs.replace(one, decodes=short))], "cost", {}) == []
