"""Recorded conversations, as lists of turns.

Three recordings are read, each in its own form: tau-bench's airline desk (many turns of a person and of tools),
BFCL's multi-turn tasks (several calls in one answer; results are made up), and mini-swe-agent's trajectories (long
answers, no tools).
"""

import ast
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import msgspec


class Called(msgspec.Struct, frozen=True):
    """One call in an answer."""

    name: str
    arguments: dict[str, Any]


class Answer(msgspec.Struct, frozen=True):
    """What the model says in one turn."""

    content: str = ""
    calls: tuple[Called, ...] = ()


class Conversation(msgspec.Struct, frozen=True):
    """One task: what is given first, and each answer with the messages that follow it."""

    name: str
    tools: list[dict[str, Any]]
    opening: list[dict[str, str]]
    turns: list[tuple[Answer, list[dict[str, str]]]]
    """A result of a tool has the number of its call in ``call``."""


def read(folder: Path, limit: int) -> list[Conversation]:
    """Up to ``limit`` of each recording that is in ``folder``."""
    readers = (
        ("tau_airline.json.xz", _tau),
        ("bfcl_v4_multiturn.tar.xz", _bfcl),
        ("miniswe_12.tar.xz", _miniswe),
    )
    found = [made for name, reader in readers if (folder / name).is_file() for made in reader(folder / name, limit)]
    if not found:
        raise FileNotFoundError(f"{folder} has none of {', '.join(name for name, _ in readers)}")
    return found


def _tau(path: Path, limit: int) -> list[Conversation]:
    with lzma.open(path) as file:
        tasks = json.load(file)
    return [_from_messages(f"tau-{at}", task["traj"]) for at, task in enumerate(tasks[:limit])]


def _from_messages(name: str, messages: list[dict[str, Any]]) -> Conversation:
    first = next(at for at, message in enumerate(messages) if message["role"] == "assistant")
    turns: list[tuple[Answer, list[dict[str, str]]]] = []
    names: dict[str, None] = {}
    for message in messages[first:]:
        if message["role"] == "assistant":
            calls = [call["function"] for call in message.get("tool_calls") or ()]
            made = tuple(Called(call["name"], json.loads(call["arguments"])) for call in calls)
            names.update(dict.fromkeys(call.name for call in made))
            turns.append((Answer((message["content"] or "").strip(), made), []))
        elif message["role"] == "tool":
            turns[-1][1].append({"role": "tool", "content": message["content"], "call": str(len(turns[-1][1]))})
        else:
            turns[-1][1].append({"role": message["role"], "content": message["content"]})
    opening = [{"role": message["role"], "content": message["content"]} for message in messages[:first]]
    return Conversation(name, [_tool(known) for known in names], opening, turns)


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}}
    function = {"name": name, "description": f"Calls {name.replace('_', ' ')}.", "parameters": parameters}
    return {"type": "function", "function": function}


def _bfcl(path: Path, limit: int) -> list[Conversation]:
    with tarfile.open(path) as archive:
        asked = _lines(archive, "bfcl/BFCL_v4_multi_turn_base.json")[:limit]
        told = {
            line["id"]: line["ground_truth"]
            for line in _lines(archive, "bfcl/possible_answer/BFCL_v4_multi_turn_base.json")
        }
    return [_from_questions(task["id"], task["question"], told[task["id"]]) for task in asked]


def _from_questions(name: str, questions: list[list[dict[str, str]]], truths: list[list[str]]) -> Conversation:
    """Each question is followed by its calls, all in one answer, by their results, and by a last word."""
    system = {"role": "system", "content": "You are an assistant with a shell and some services."}
    opening = [system, *_plain(questions[0])]
    turns: list[tuple[Answer, list[dict[str, str]]]] = []
    names: dict[str, None] = {}
    for at, truth in enumerate(truths):
        calls = tuple(_parsed(text) for text in truth)
        names.update(dict.fromkeys(call.name for call in calls))
        after = _plain(questions[at + 1]) if at + 1 < len(questions) else []
        if calls:
            results = [
                {"role": "tool", "content": f'{{"done": "{call.name}"}}', "call": str(k)}
                for k, call in enumerate(calls)
            ]
            turns.append((Answer("", calls), results))
        turns.append((Answer(f"That was part {at + 1} of {len(truths)}."), after))
    return Conversation(name, [_tool(known) for known in names], opening, turns)


def _parsed(text: str) -> Called:
    """A call as Python writes it."""
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    arguments = {f"argument_{at}": ast.literal_eval(value) for at, value in enumerate(call.args)}
    arguments |= {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
    return Called(ast.unparse(call.func), arguments)


def _miniswe(path: Path, limit: int) -> list[Conversation]:
    found: list[Conversation] = []
    with tarfile.open(path) as archive:
        for member in archive.getmembers()[:limit]:
            file = archive.extractfile(member)
            assert file is not None
            messages = json.loads(file.read())["messages"]
            found.append(_from_messages(Path(member.name).name.removesuffix(".traj.json"), messages))
    return found


def _plain(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _lines(archive: tarfile.TarFile, name: str) -> list[Any]:
    file = archive.extractfile(name)
    assert file is not None
    return [json.loads(line) for line in file.read().decode().splitlines()]
