"""``tracehaul batch run`` against a real server of fake engines: killed as it goes, each line ends exactly once."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from cluster.cli import commands
from cluster.rundir import ClusterFault
from tests.served import served
from tracehaul.runtime import clock

HERE = Path(__file__).parent
MODEL = "org/fake"
LINES = 120


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batch") / "asked"


@pytest.fixture(scope="module")
def url(asked: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ASKED", str(asked))
        environment.setenv("KEPT", str(asked.parent / "kept"))
        with served(HERE / "batch_server.py") as address:
            yield address


def line(custom_id: str, said: str, url: str = "/v1/chat/completions", **more: Any) -> bytes:
    prompts = {"/v1/chat/completions": {"messages": [{"role": "user", "content": said}]}}
    prompt = prompts.get(url) or {"input" if url == "/v1/responses" else "prompt": said}
    body = {"model": MODEL, **prompt, **more}
    return msgspec.json.encode({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + b"\n"


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", "batch", "run", *map(str, args)]


def batch(*args: object) -> Result:
    """In this process: starting one takes longer than all that it does."""
    return CliRunner().invoke(commands("batch"), ["batch", "run", *map(str, args)])


def results(path: Path) -> dict[str, dict[str, Any]]:
    found = [msgspec.json.decode(each) for each in path.read_bytes().splitlines()]
    assert max(Counter(each["custom_id"] for each in found).values(), default=1) == 1
    return {each["custom_id"]: each for each in found}


def test_each_line_ends_once_however_often_it_is_killed(tmp_path: Path, url: str, asked: Path) -> None:
    calls, out = tmp_path / "calls.jsonl", tmp_path / "out.jsonl"
    calls.write_bytes(b"".join(line(f"c{at}", f"killed {at} of it") for at in range(LINES)))
    order = command(calls, "-o", out, "--url", url, "--concurrency", 4)
    for share in (0.2, 0.6):
        running = subprocess.Popen(order, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = clock.perf_s() + 60
        while not out.exists() or out.read_bytes().count(b"\n") < share * LINES:
            assert running.poll() is None, "it ended before it could be killed"
            assert clock.perf_s() < deadline_s
        running.send_signal(signal.SIGKILL)
        running.wait()
        with out.open("ab") as file:  # what a killed process may leave
            file.write(b'{"id":"batch_req_12')
    done = batch(calls, "-o", out, "--url", url, "--concurrency", 4)
    assert done.exit_code == 0, done.stderr
    assert f"{LINES} answered, 0 failed of {LINES}" in done.stdout
    assert results(out).keys() == {f"c{at}" for at in range(LINES)}
    told = [each for each in asked.read_text().splitlines() if "killed" in each]
    assert len(told) <= LINES + 2 * 4, "what had ended was not asked again"
    assert {each.split()[0] for each in told} == {"background"}
    again = batch(calls, "-o", out, "--url", url)
    assert (again.exit_code, len(asked.read_text().splitlines())) == (0, len(told)), again.output


def test_poison_goes_to_the_errors_and_who_is_busy_is_asked_again(tmp_path: Path, url: str) -> None:
    calls, out, errors = tmp_path / "calls", tmp_path / "out", tmp_path / "err"
    wrong = {"temperature": 99}
    lines = [
        line("ok", "fine"),
        line("long", "x" * 100_000),
        line("poison", "poison"),
        line("busy", "busy"),
        line("wrong", "fine", **wrong),
        line("completion", "hello", "/v1/completions"),
        line("response", "hello", "/v1/responses"),
    ]
    calls.write_bytes(b"".join(lines))
    done = batch(calls, "-o", out, "--errors", errors, "--url", url + "/v1")
    assert done.exit_code == 3, done.stderr
    assert "4 answered, 3 failed of 7" in done.stdout
    answered, failed = results(out), results(errors)
    assert answered.keys() == {"ok", "busy", "completion", "response"}
    assert answered["ok"]["response"]["body"]["choices"][0]["message"]["content"] == "héllo 🙂"
    assert all(each["error"] is None and each["response"]["request_id"] for each in answered.values())
    assert failed["poison"]["response"]["status_code"] == 500
    assert failed["wrong"]["response"]["body"]["error"]["param"] == "temperature"
    assert failed["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"


def test_steps_of_a_trace_are_asked_in_order(tmp_path: Path, url: str, asked: Path) -> None:
    calls, out = tmp_path / "calls", tmp_path / "out"
    steps = [
        line(f"{trace}-{at}", f"step {trace} {at} of it", metadata={"trace_id": f"t{trace}"})
        for at in range(4)
        for trace in range(3)
    ]
    calls.write_bytes(b"".join(steps))
    assert batch(calls, "-o", out, "--url", url).exit_code == 0
    told = [each.split() for each in asked.read_text().splitlines() if "step" in each]
    for trace in range(3):
        assert [each[-3] for each in told if each[-4] == str(trace)] == ["0", "1", "2", "3"]


def test_wrong_lines_are_all_named_and_nothing_is_asked(tmp_path: Path, url: str, asked: Path) -> None:
    calls, out = tmp_path / "calls", tmp_path / "out"
    lines = [line("a", "nothing"), b"{\n", line("a", "nothing"), line("e", "x", "/v1/embeddings")]
    calls.write_bytes(b"".join(lines))
    done = batch(calls, "-o", out, "--url", url)
    assert done.exit_code == 1
    assert [each.split(": ")[:2] for each in done.stderr.splitlines()[:-1]] == [
        ["line 2", "invalid_json_line"],
        ["line 3", "duplicate_custom_id"],
        ["line 4", "invalid_url"],
    ]
    assert not out.exists()
    assert not asked.exists() or "nothing" not in asked.read_text()


def test_what_cannot_be_is_said_in_a_line(tmp_path: Path, url: str) -> None:
    calls, out = tmp_path / "calls", tmp_path / "out"
    calls.write_bytes(line("a", "x"))
    assert "no router answers" in str(batch(calls, "-o", out, "--url", "http://127.0.0.1:9").exception)
    assert f"cannot read {tmp_path}/no" in str(batch(tmp_path / "no", "-o", out, "--url", url).exception)
    out.write_text("my notes\n")
    fault = batch(calls, "-o", out, "--url", url).exception
    assert isinstance(fault, ClusterFault)
    assert "choose another file" in str(fault)
    assert out.read_text() == "my notes\n"
    assert sorted(os.listdir(tmp_path)) == ["calls", "out"]
