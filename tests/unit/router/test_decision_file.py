import asyncio

import msgspec

from cluster import decision_file
from cluster.decision_file import DecisionFile, Line, noted_of
from router.adapt.loop import Change, Verdict
from router.adapt.story import Noted
from router.traces.decisions import Asked, Entry
from tracehaul.wire.ids import NodeId, TraceId


def test_decisions_are_json_lines_in_files_of_bounded_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(decision_file, "FILE_BYTES_MAX", 2000)

    async def main() -> None:
        file = DecisionFile(tmp_path / "decisions.jsonl")
        for at in range(100):
            file.write(("", TraceId(f"t{at}")), Entry(1.0, Asked("suspend", {"expected_s": 5.0, "tool": "make %s"})))
        file.close()

    asyncio.run(main())
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["decisions.jsonl", "decisions.jsonl.1"]
    lines = [line for path in reversed(paths) for line in path.read_bytes().splitlines()]
    assert all(path.stat().st_size <= 2000 for path in paths)
    last = msgspec.json.decode(lines[-1], type=Line)
    assert (last.trace, last.decision) == ("t99", Asked("suspend", {"expected_s": 5.0, "tool": "make %s"}))
    assert all(msgspec.json.decode(line, type=Line) for line in lines)


def test_a_decision_is_in_the_file_soon_though_none_follows(tmp_path) -> None:
    path = tmp_path / "decisions.jsonl"

    async def main() -> None:
        file = DecisionFile(path)
        file.write(("", TraceId("t")), Entry(1.0, Asked("resume", {})))
        await asyncio.sleep(decision_file.LATE_S)
        while not path.stat().st_size:  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.01)
        file.close()

    asyncio.run(main())
    assert msgspec.json.decode(path.read_bytes(), type=Line).trace == "t"


def test_a_disk_that_refuses_costs_the_lines_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(decision_file, "FILE_BYTES_MAX", 200)

    async def main() -> None:
        file = DecisionFile(tmp_path / "gone" / "d.jsonl")
        (tmp_path / "gone" / "d.jsonl").unlink()
        (tmp_path / "gone").rmdir()  # it can neither be put aside nor made anew
        for at in range(20):
            file.write(("", TraceId(f"t{at}")), Entry(1.0, Asked("resume", {})))
        file.close()

    (tmp_path / "gone").mkdir()
    asyncio.run(main())


def test_what_was_changed_at_a_node_is_found_again_among_all_else(tmp_path) -> None:
    path, node = tmp_path / "decisions.jsonl", NodeId("decode-1")
    change = Noted(1.0, "", Change(1, node, "prefill", 0.25, quicker=False, inputs={"rate": 2.0}))
    verdict = Noted(9.0, "", Verdict(1, node, "kept", "more is done"))

    async def main() -> None:
        file = DecisionFile(path)
        file.write_noted(change)
        file.write(("", TraceId(node)), Entry(1.0, Asked("resume", {})))
        file.write_noted(Noted(2.0, "", Verdict(7, NodeId("decode-2"), "kept", "more is done")))
        file.write_noted(verdict)
        file.close()

    asyncio.run(main())
    assert noted_of(path, node) == [change, verdict]
    assert [line.trace for line in decision_file.lines_of(path, node, "")] == [node]
