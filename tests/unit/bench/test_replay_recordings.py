"""Recordings in their formats, what is taken of them, and the tokens they become."""

import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bench.common.recordings import documents, find
from bench.replay.choose import Forks, Limits, choose, forks, shrink, whole_groups
from bench.replay.hits import theoretical
from bench.replay.parse import parse
from bench.replay.recording import Blocks, Messages, Step, Trace
from bench.replay.tokens import packed_prompt, prompt_text, prompt_tokens


def call(ids: list[int], out: int = 5, think: float = 0.0, size: int | None = None) -> dict[str, Any]:
    return {"t": 0.0, "type": "n", "in": size or 4 * len(ids), "out": out, "hash_ids": ids, "think_time": think}


def agent(name: str, *requests: dict[str, Any]) -> dict[str, Any]:
    return {"type": "subagent", "t": 1.0, "agent_id": name, "requests": list(requests), "system_tokens": 4}


def session(name: str, *requests: dict[str, Any]) -> tuple[str, bytes]:
    document = {"id": name, "block_size": 4, "tool_tokens": 4, "system_tokens": 4, "requests": list(requests)}
    return f"{name}.json", json.dumps(document).encode()


WEKA = session(
    "s1",
    call([1, 2, 3]),
    agent("a", call([7, 8]), call([7, 8, 9], think=3.0)),
    agent("b", call([7, 10])),
    call([1, 2, 3, 4], think=2.5, size=14),
    call([1, 2, 3, 4, 5]),
)


def test_a_session_with_subagents_becomes_a_tree_of_steps() -> None:
    (trace,) = parse([WEKA])
    assert [step.prompt.tokens for step in trace.steps] == [12, 14, 20]
    assert [step.gap_s for step in trace.steps] == [0.0, 2.5, 0.0]
    assert [child.trace for child in trace.steps[0].children] == ["s1.a", "s1.b"]
    assert {child.parent for child in trace.steps[0].children} == {"s1"}
    assert [t.trace for t, _ in trace.walk()] == ["s1", "s1.a", "s1.a", "s1.b", "s1", "s1"]
    first, inner = trace.steps[0].prompt, trace.steps[0].children[0].steps[0].prompt
    assert isinstance(first, Blocks)
    assert isinstance(inner, Blocks)
    assert (first.common_blocks, first.kind) == (2, "main")
    assert (inner.common_blocks, inner.kind, inner.scope) == (1, "sub", "s1")


def test_a_subagent_before_any_call_starts_with_the_first() -> None:
    (trace,) = parse([session("s", agent("a", call([7])), call([1]), call([1, 2]))])
    assert [[child.trace for child in step.children] for step in trace.steps] == [["s.a"], []]


def test_requests_without_sessions_keep_their_times_and_share_their_names() -> None:
    lines = [
        {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]},
        {"timestamp": 2500, "input_length": 1024, "output_length": 4, "hash_ids": [0, 2]},
        {"timestamp": 2600, "input_length": 0, "output_length": 4, "hash_ids": []},
    ]
    traces = parse([("m.jsonl", "\n".join(json.dumps(line) for line in lines).encode())])
    assert [(trace.start_s, len(trace.steps)) for trace in traces] == [(0.0, 1), (2.5, 1)]
    one, two = (
        prompt_tokens(trace.steps[0].prompt, "") for trace in traces if isinstance(trace.steps[0].prompt, Blocks)
    )
    assert (one[:512] == two[:512]).all()
    assert not (one[512:] == two[512:600]).all()


def test_a_trajectory_is_a_step_per_answer_with_the_gaps_between_them() -> None:
    def answer(text: str, created: int) -> dict[str, Any]:
        usage = {"prompt_tokens": 100 + created, "completion_tokens": 7}
        return {"role": "assistant", "content": text, "extra": {"response": {"created": created, "usage": usage}}}

    messages = [{"role": "user", "content": "do"}, answer("ls", 10), {"role": "user", "content": "a"}, answer("x", 14)]
    (trace,) = parse([("t1.traj.json", json.dumps({"messages": messages}).encode())])
    assert trace.trace == "t1"
    assert [(step.gap_s, step.output_tokens, step.prompt.tokens) for step in trace.steps] == [(0, 7, 110), (4, 7, 114)]
    last = trace.steps[1].prompt
    assert isinstance(last, Messages)
    assert [message["content"] for message in last.messages] == ["do", "ls", "a"]


def test_what_is_no_recording_is_refused() -> None:
    for name, data in (("a.json", b"{}"), ("a.json", b"["), ("b.jsonl", b"{}\n"), session("s", {"type": "?"})):
        with pytest.raises(ValueError, match=r"recording|format|request"):
            parse([(name, data)])
    with pytest.raises(ValueError, match="no recording"):
        parse([("readme.txt", b"")])


def test_recordings_are_found_in_folders_and_archives(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "s1.json").write_bytes(WEKA[1])
    with tarfile.open(tmp_path / "weka_dev.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "one", "weka")
    line = {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]}
    (tmp_path / "mooncake.jsonl.xz").write_bytes(lzma.compress(json.dumps(line).encode()))
    assert len(parse(documents(find(tmp_path / "one", None)))) == 1
    assert parse(documents(find(tmp_path, "weka")))[0].trace == "s1"
    assert parse(documents(find(tmp_path, "mooncake")))[0].start_s == 0.0
    with pytest.raises(ValueError, match=r"mooncake\.jsonl\.xz, weka_dev\.tar\.xz"):
        find(tmp_path, None)
    with pytest.raises(FileNotFoundError):
        find(tmp_path, "other")
    with pytest.raises(FileNotFoundError):
        find(tmp_path / "nowhere", None)


def long_trace(name: str, *sizes: int, output: int = 50) -> Trace:
    steps = tuple(Step(Blocks(name, tuple(range(size // 4)), 4, size), output, 1.0) for size in sizes)
    return Trace(name, steps)


def test_limits_cut_skip_and_leave_out() -> None:
    traces = [long_trace("short", 8), long_trace("long", 8, 16, 24, 400, 500), long_trace("small", 8, 12, 16)]
    limits = Limits(steps_min=2, skip_steps=1, context_min=20, context_max=430, output_max=10)
    (chosen,) = choose(traces, limits, seed=3)
    assert chosen.trace == "long"
    assert [step.prompt.tokens for step in chosen.steps] == [16, 24, 400]
    assert [step.gap_s for step in chosen.steps] == [0.0, 1.0, 1.0], "nothing comes before the first"
    assert {step.output_tokens for step in chosen.steps} == {10}
    firsts = {choose(traces, Limits(traces_max=1), seed)[0].trace for seed in range(20)}
    assert firsts == {"short", "long", "small"}, "the seed decides the order"
    within = choose(traces[::2], Limits(prompt_tokens_max=43), 1)
    assert len(within) == 1, "together they have 44"


def test_only_traces_with_subagents_if_asked() -> None:
    traces = [*parse([WEKA]), long_trace("alone", 8, 16)]
    assert [trace.trace for trace in choose(traces, Limits(subagents_only=True), 1)] == ["s1"]


def test_tokens_follow_from_names_and_salt_alone() -> None:
    prompt = Blocks("s", (1, 2), 4, 10)
    tokens = prompt_tokens(prompt, "")
    assert len(tokens) == 10
    assert tokens.tolist() == prompt_tokens(Blocks("s", (1, 2), 4, 10), "").tolist()
    assert prompt_tokens(Blocks("s", (1, 3), 4, 8), "")[:4].tolist() == tokens[:4].tolist()
    for other in (prompt_tokens(Blocks("z", (1, 2), 4, 10), ""), prompt_tokens(prompt, "salt")):
        assert other[:4].tolist() != tokens[:4].tolist()
    assert prompt_tokens(Blocks("s", (1, 2), 4, 6), "").tolist() == tokens[:6].tolist(), "the last block is cut"
    assert len(prompt_text(tokens).split()) == 10


def test_common_blocks_are_the_same_in_other_traces() -> None:
    one, two = Blocks("s", (1, 2), 4, 8, 1), Blocks("z", (9, 2), 4, 8, 1)
    assert prompt_tokens(one, "")[:4].tolist() == prompt_tokens(two, "")[:4].tolist()
    assert prompt_tokens(one, "")[4:].tolist() != prompt_tokens(two, "")[4:].tolist()


def test_children_of_a_made_up_fork_continue_their_parent() -> None:
    (parent,) = forks(Forks(children=3, context_tokens=256), seed=1)
    base = packed_prompt(parent.steps[0].prompt, "")
    children = parent.steps[0].children
    assert len(children) == 3
    firsts = [packed_prompt(child.steps[0].prompt, "") for child in children]
    assert all(first.startswith(base) and len(first) == len(base) + 4 * 128 for first in firsts)
    assert len(set(firsts)) == 3
    assert packed_prompt(children[0].steps[1].prompt, "").startswith(firsts[0])


def test_the_bound_of_hits() -> None:
    def packed(*ids: int, tokens: int) -> bytes:
        return packed_prompt(Blocks("s", ids, 4, tokens), "")

    sent = [
        ("a", packed(1, 2, tokens=8)),
        ("a", packed(1, 2, 3, tokens=12)),
        ("b", packed(1, 2, 4, tokens=12)),
        ("a", packed(1, 2, tokens=8)),
        ("b", packed(5, 2, tokens=8)),
    ]
    bounds = theoretical(sent, 4)
    assert [bound.shared for bound in bounds] == [0, 8, 8, 4, 0], "whole blocks; the last token is always computed"
    assert [bound.own for bound in bounds] == [0, 8, 0, 4, 0]


def test_messages_count_four_bytes_as_a_token() -> None:
    first = ({"role": "user", "content": "x" * 94},)
    then = (*first, {"role": "assistant", "content": "y" * 90})
    sent = [("t", packed_prompt(Messages(messages, 1), "")) for messages in (first, then)]
    assert len(sent[0][1]) == 100
    assert theoretical(sent, 8)[1].shared == 24


def request(n: int, ids: tuple[int, ...], tokens: int) -> Trace:
    return Trace(f"r{n}", (Step(Blocks("recording", ids, 512, tokens), 100, 0.0),), start_s=float(n))


def test_a_shrunk_recording_shares_block_by_block_what_it_shared() -> None:
    whole = [request(0, (1, 2, 3), 1500), request(1, (1, 2, 4), 1030), request(2, (5,), 3)]
    small = [shrink(trace, 16) for trace in whole]
    assert [trace.steps[0].prompt.tokens for trace in small] == [94, 65, 1]
    assert [trace.steps[0].output_tokens for trace in small] == [6, 6, 6]
    assert [trace.start_s for trace in small] == [0.0, 1.0, 2.0]
    bounds = theoretical([(trace.trace, packed_prompt(trace.steps[0].prompt, "")) for trace in small], 32)
    assert [bound.shared for bound in bounds] == [0, 64, 0]


def test_groups_that_begin_alike_are_taken_whole_and_in_order() -> None:
    whole = [request(n, (n % 10, n), 1024) for n in range(40)]
    part = whole_groups(whole, 5, seed=3)
    assert len(part) == 8
    assert len({trace.steps[0].prompt.ids[0] for trace in part if isinstance(trace.steps[0].prompt, Blocks)}) == 2
    assert part == [trace for trace in whole if trace in part]
    assert whole_groups(whole, 1, seed=3) == whole
