import msgspec

from cluster import decision_file
from cluster.decision_file import DecisionFile, Line
from router.traces.decisions import Asked, Entry
from tracehaul.wire.ids import TraceId


def test_decisions_are_json_lines_in_files_of_bounded_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(decision_file, "FILE_BYTES_MAX", 2000)
    file = DecisionFile(tmp_path / "decisions.jsonl")
    for at in range(100):
        file.write(TraceId(f"t{at}"), Entry(1.0, Asked("suspend", {"expected_s": 5.0, "tool": "make %s"})))
    file.close()
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["decisions.jsonl", "decisions.jsonl.1"]
    lines = [line for path in reversed(paths) for line in path.read_bytes().splitlines()]
    assert all(path.stat().st_size <= 2000 for path in paths)
    last = msgspec.json.decode(lines[-1], type=Line)
    assert (last.trace, last.decision) == ("t99", Asked("suspend", {"expected_s": 5.0, "tool": "make %s"}))
