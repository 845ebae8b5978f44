"""Replays over stock servers: which server a session goes to, what makes a run no measurement, and its figures."""

import asyncio

import httpx
import pytest

from bench.common.usage import Usage
from bench.engines.replay import Run, faults, results_of
from bench.replay.endpoint import Form
from bench.replay.hits import Bound
from bench.replay.records import Hits, StepRecord
from bench.replay.run import Outcome
from bench.replay.sticky import Sticky


def record(index: int, *, counted: int = 100, late_s: float = 0.0, error: str | None = None) -> StepRecord:
    return StepRecord(
        "t", None, index, 1.0, 1.0 + late_s, 100, 8, 9.0, 2.0, prompt_tokens=counted, cached_tokens=50, error=error
    )


QUIET = Usage(60.0, 61.0, 80.0)


def outcome(*records: StepRecord, hits: Hits | None, wall_s: float = 36.0) -> Outcome:
    return Outcome(Form("tokens", exact=True), wall_s, list(records), [], [Bound(50, 50)] * len(records), hits)


def test_a_session_stays_with_its_server_and_a_new_one_takes_the_emptiest() -> None:
    async def server(request: httpx.Request) -> httpx.Response:
        assert request.headers["Host"] == request.url.netloc.decode()
        return httpx.Response(200, text=str(request.url))

    async def main() -> None:
        sticky = Sticky(["http://a:1", "http://b:2"], httpx.MockTransport(server))
        async with httpx.AsyncClient(base_url="http://anywhere", transport=sticky) as http:

            async def where(session: str | None = None) -> str:
                headers = {} if session is None else {"X-Session-Id": session}
                return (await http.post("/v1/completions", headers=headers)).text

            first, second = await where("x"), await where("y")
            assert {first, second} == {"http://a:1/v1/completions", "http://b:2/v1/completions"}
            assert [await where(session) for session in "yxy"] == [second, first, second]
            assert {await where() for _ in range(4)} == {first, second}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (outcome(record(0), hits=Hits(0.5, 0.5, 0.5)), None),
        (outcome(record(3, error="timeout"), hits=Hits(0.5, 0.5, 0.5)), "step 3 of t: timeout"),
        (outcome(record(0, counted=99), hits=Hits(0.5, 0.5, 0.5)), "99 tokens counted, 100 sent"),
        (outcome(record(0), hits=None), "nothing was told of hits"),
        (outcome(record(0), hits=Hits(0.6, 0.5, 0.5)), "hits of 0.600"),
        (outcome(record(0, late_s=1.0), hits=Hits(0.5, 0.5, 0.5)), "sent too late"),
    ],
)
def test_what_makes_a_run_no_measurement_is_said(run: Outcome, says: str | None) -> None:
    found = faults(Run(run, QUIET))
    assert (not found) if says is None else any(says in fault for fault in found)


def test_a_run_beside_other_work_is_no_measurement() -> None:
    run = outcome(record(0), hits=Hits(0.5, 0.5, 0.5))
    (said,) = faults(Run(run, Usage(40.0, 60.0, 80.0)))
    assert said == "0.25 of the cores' time went to other work"


def test_ours_is_divided_by_each_over_all_rounds() -> None:
    hits = Hits(0.4, 0.5, 0.5)
    steps = [record(index) for index in range(10)]
    slow, fast = outcome(*steps, hits=hits, wall_s=30.0), outcome(*steps, hits=hits, wall_s=10.0)
    runs = {
        "ours": [Run(fast, QUIET), Run(slow, Usage(80.0, 80.0, 80.0))],
        "lmcache": [Run(slow, QUIET), Run(slow, QUIET)],
    }
    figures = {result.name: result for result in results_of(runs)}
    assert figures["engines.replay.steps_per_h.ours"].value == 3600 * 20 / 40
    assert figures["engines.replay.lmcache"].value == pytest.approx(1.5)
    assert figures["engines.replay.hits.ours"].ratio == pytest.approx(0.8)
    assert figures["engines.replay.cpu.ours"].value == pytest.approx(140 / 20)
    assert "engines.replay.ample" not in figures
