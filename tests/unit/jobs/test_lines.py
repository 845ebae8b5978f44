"""What is wrong with a batch's file is named, line by line, however it is cut; what is right is in order."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.lines import Call, Checked, Limits, LineError, Reader, call_of, is_alone, model_not_found

CHAT = "/v1/chat/completions"
NONE = Limits()
HOUSE = Path(__file__).parents[3]


def line(custom_id: str = "a", url: str = CHAT, method: str = "POST", **body: Any) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | body
    body = {name: value for name, value in body.items() if value is not ...}
    return msgspec.json.encode({"custom_id": custom_id, "method": method, "url": url, "body": body})


def check(data: bytes, chunk: int = 1 << 20, endpoint: str | None = None, limits: Limits = NONE) -> Checked:
    reader = Reader(endpoint, lambda model: None if model == "m" else model_not_found(model), limits)
    for start in range(0, len(data), chunk):
        reader.feed(data[start : start + chunk])
    return reader.end()


def error(data: bytes, **options: Any) -> LineError:
    checked = check(line("first") + b"\n\n" + data, **options)
    (found,) = checked.errors
    assert checked.wrong == 1
    assert found.line == 3
    return found


@pytest.mark.parametrize(
    ("data", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (line("b")[:-1] + b', "x": "\xff"}', "invalid_json_line", None),
        pytest.param(line("b")[:-2] + b', "x": ' + b"[" * 5000, "invalid_json_line", None, id="nested"),
        (b"[]", "invalid_request", None),
        (b'{"custom_id": "b"}', "missing_required_parameter", "method"),
        (line("b", model=...), "missing_required_parameter", "body.model"),
        (line("b", messages=...), "missing_required_parameter", "body.messages"),
        (line("b", messages=None), "missing_required_parameter", "body.messages"),
        (line("b", model=3), "invalid_request", "body.model"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("b" * 513), "invalid_custom_id", "custom_id"),
        (line("b", method="GET"), "invalid_method", "method"),
        (line("b", url="/v1/embeddings"), "invalid_url", "url"),
        (line("b", url="/v1/traces"), "invalid_url", "url"),
        (line("b", model="other"), "model_not_found", "body.model"),
        (line("b", stream=True), "invalid_request", "body.stream"),
        (line("b", url="/v1/responses", input="x", background=True), "invalid_request", "body.background"),
        (line("b", metadata={"trace_id": 3}), "invalid_request", "body.metadata"),
    ],
)
def test_a_wrong_line_is_named(data: bytes, code: str, param: str | None) -> None:
    found = error(data)
    assert (found.code, found.param) == (code, param)


def test_a_duplicate_names_the_line_of_before() -> None:
    assert "line 1 " in error(line("first")).message


def test_embeddings_are_refused_by_name() -> None:
    assert "/v1/embeddings is not served" in error(line("b", url="/v1/embeddings")).message


def test_another_url_than_the_batchs_is_refused() -> None:
    found = error(line("b", url="/v1/completions", prompt="x"), endpoint=CHAT)
    assert found.code == "url_mismatch"


def test_limits_are_told_once() -> None:
    lines = b"\n".join(line(str(at)) for at in range(5))
    assert [e.code for e in check(lines, limits=Limits(lines_max=3)).errors] == ["too_many_tasks"]
    assert [e.code for e in check(lines, limits=Limits(bytes_max=200)).errors] == ["file_too_large"]
    assert not check(lines, limits=Limits(bytes_max=len(lines))).errors
    long = check(line("a") + b"\n" + line("b", messages="x" * 1000), limits=Limits(line_bytes_max=500))
    assert [(e.code, e.line) for e in long.errors] == [("line_too_long", 2)]
    assert [e.code for e in check(b"\n \n").errors] == ["empty_file"]
    many = check(b"{\n" * 10, limits=Limits(errors_max=4))
    assert (len(many.errors), many.wrong) == (4, 10)


@settings(max_examples=30)
@given(st.data())
def test_chunks_change_nothing(data: st.DataObject) -> None:
    made = [line(name, stream=wrong or ...) for name, wrong in data.draw(st.lists(st.tuples(st.text(), st.booleans())))]
    text = data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(made) + data.draw(st.sampled_from([b"", b"\n"]))
    whole, pieces = check(text), check(text, chunk=data.draw(st.integers(1, 40)))
    assert (whole.errors, whole.wrong, whole.table.index) == (pieces.errors, pieces.wrong, pieces.table.index)
    for custom_id, at in pieces.table.index.items():
        offset, length = pieces.table.place(at)
        call = call_of(text[offset : offset + length])
        assert (call.custom_id, call.url) == (custom_id, CHAT)
        assert msgspec.json.decode(call.body)["model"] == "m"


def test_a_call_that_names_no_trace_is_alone() -> None:
    def alone(body: bytes) -> bool:
        return is_alone(call_of(b'{"custom_id": "1", "url": "/v1/responses", "body": %b}' % body))

    assert alone(b'{"model": "m", "metadata": null}')
    assert alone(b'{"metadata": {"trace_id": null, "kind": 3}, "prompt_cache_key": ""}')
    assert not alone(b'{"metadata": {"trace_id": "t"}}')
    assert not alone(b'{"prompt_cache_key": "k"}')
    assert not alone(b'{"previous_response_id": "r"}')
    assert not alone(b'{"previous_response_id": 3}')
    assert not is_alone(Call("1", CHAT, msgspec.Raw(b'{"x": ' + b"[" * 100_000)))
    assert not is_alone(Call("1", CHAT, msgspec.Raw(b'{"prompt_cache_key": "\xff"}')))


def test_lines_that_begin_alike_follow_each_other_and_steps_of_a_trace_are_a_chain() -> None:
    def of(agent: int, **more: Any) -> dict[str, Any]:
        return {"messages": [{"role": "system", "content": f"agent {agent} " * 100}, {"role": "user"}], **more}

    lines = [
        line("0", **of(1)),
        line("1", **of(2, metadata={"trace_id": "t"})),
        line("2", **of(1)),
        line("3", **of(3, metadata={"trace_id": "u", "other": [1]})),
        line("4", **of(2)),
        line("5", **of(9, metadata={"trace_id": "t"})),
        line("6", **of(1)),
    ]
    chains = [list(chain) for chain in check(b"\n".join(lines)).table.chains()]
    assert sorted(map(sorted, chains)) == [[0], [1, 5], [2], [3], [4], [6]]
    assert [1, 5] in chains
    first = chains.index([0])
    assert chains[first : first + 3] == [[0], [2], [6]]
    assert abs(chains.index([1, 5]) - chains.index([4])) == 1


def test_a_large_file_takes_little_memory() -> None:
    """A process of its own, as what was used at most never falls."""
    script = """
import resource, sys
from jobs.lines import Reader
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pad = "x" * 4000
def part(begin):
    return "".join('{"custom_id":"request-%d","method":"POST","url":"/v1/chat/completions","body":'
        '{"model":"m","messages":[{"role":"user","content":"%s"}]}}\\n' % (at, pad) for at in range(begin, begin + 50)
    ).encode()
part(0)
reader, before = Reader(), peak()
for begin in range(0, 50_000, 50):
    reader.feed(part(begin))
checked = reader.end()
chains = checked.table.chains()
print(len(checked.table), checked.wrong, peak() - before)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=True)
    lines, wrong, kilobytes = map(int, done.stdout.split())
    assert (lines, wrong) == (50_000, 0)
    assert kilobytes < 64 * 1024
