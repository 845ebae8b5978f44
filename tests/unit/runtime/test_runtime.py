import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from tracehaul.runtime.log import LineFormatter, Log, Seldom, setup, setup_beside
from tracehaul.runtime.tasks import Tasks


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    setup("decode-0", "info", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_log_line_is_one_line_with_the_node_and_the_fields(lines: io.StringIO) -> None:
    log = Log("kvstore.node.node")
    log.info("lease expired", lease=7, age_s=1.23456789, who="a b", why='say "x"=1\nnext', empty="")
    log.debug("not shown")
    [line] = lines.getvalue().splitlines()
    assert " info decode-0 kvstore.node.node " in line
    assert line.endswith(r'"lease expired" lease=7 age_s=1.23457 who="a b" why="say \"x\"=1\nnext" empty=""')


def test_exceptions_and_foreign_records_are_one_line_too(lines: io.StringIO) -> None:
    try:
        raise KeyError("gone\nhere")
    except KeyError as error:
        Log("x").error("crashed", error=error)
    logging.getLogger("library").warning("two\nlines %s", "100%")
    first, second = lines.getvalue().splitlines()
    assert "Traceback" in first
    assert "KeyError" in first
    assert r'"two\nlines 100%"' in second


def test_long_values_are_cut(lines: io.StringIO) -> None:
    Log("x").warning("big", value="y" * 100_000)
    assert len(lines.getvalue()) < 5000


def test_tasks_end_with_their_owner() -> None:
    async def main() -> None:
        ended: list[str] = []

        async def work(name: str) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0)
                ended.append(name)

        async with Tasks("node") as tasks:
            tasks.start(work("a"), "a")
            tasks.start(work("b"), "b")
            tasks.start(asyncio.sleep(0), "short")
            await asyncio.sleep(0.01)
            assert len(tasks) == 2
        assert ended == ["a", "b"]
        with pytest.raises(AssertionError, match="closed"):
            tasks.start(asyncio.sleep(0), "late")

    asyncio.run(main())


def test_a_crash_is_logged_kept_and_raised_to_who_waits_for_it(caplog: pytest.LogCaptureFixture) -> None:
    async def crash() -> None:
        raise ValueError("boom")

    async def main() -> None:
        async with Tasks("node") as tasks:
            going_on = tasks.start(asyncio.sleep(60), "other")
            tasks.start(crash(), "crash")
            with pytest.raises(ValueError, match="boom"):
                await tasks.crash()
            assert not going_on.done()

    asyncio.run(main())
    assert "task crashed" in caplog.text


def test_a_task_that_resists_its_cancellation_once_ends_too() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    async def main() -> None:
        tasks = Tasks("node")
        tasks.start(stubborn(), "stubborn")
        await asyncio.sleep(0)
        close = asyncio.create_task(tasks.close())
        await asyncio.sleep(0.01)
        close.cancel()  # the owner of the owner may give up, and try again
        await asyncio.wait([close])
        await asyncio.wait_for(tasks.close(), 1)
        assert len(tasks) == 0

    asyncio.run(main())


def test_what_happens_often_is_said_seldom(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    now_s = [100.0]
    monkeypatch.setattr("tracehaul.runtime.clock.perf_s", lambda: now_s[0])
    seldom = Seldom(Log("test.seldom"), every_s=10.0)
    for second in range(25):
        now_s[0] = 100.0 + second
        seldom.warning("it happens", n=second)
        if second == 3:
            seldom.warning("it happens", about="elsewhere", n=second)
    told = [record.__dict__["tracehaul_fields"] for record in caplog.records if record.name == "test.seldom"]
    assert told == [{"n": 0}, {"n": 3}, {"n": 10, "unsaid": 9}, {"n": 20, "unsaid": 9}]


@pytest.fixture
def theirs() -> Iterator[list[logging.Handler]]:
    """The root's handlers, as another program has them; ours are as they were afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("engines")
    before = root.handlers[:], ours.handlers[:], ours.propagate, ours.level
    root.handlers[:] = []
    yield root.handlers
    root.handlers[:], ours.handlers[:], ours.propagate, level = before
    ours.setLevel(level)


def test_our_lines_keep_their_facts_in_another_programs_process(
    theirs: list[logging.Handler], capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    theirs.append(logging.StreamHandler(stream))
    setup_beside("decode-0+engine")
    Log("engines.blocks.store").info("blocks", root="ab")
    assert stream.getvalue() == "", "once is enough"
    assert capsys.readouterr().err.endswith("info decode-0+engine engines.blocks.store blocks root=ab\n")


def test_who_set_logs_up_as_ours_are_keeps_them(theirs: list[logging.Handler]) -> None:
    theirs.append(logging.StreamHandler())
    theirs[-1].setFormatter(LineFormatter("store-0"))
    setup_beside("engine")
    assert logging.getLogger("engines").handlers == []
