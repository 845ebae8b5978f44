"""What the documents say is there: commands, log lines, files, numbers."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import typer.main

from cluster import cli

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def tracked(pattern: str) -> list[str]:
    """Files that the project has, by a pattern of git's."""
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split() if (ROOT / path).exists()]


def code() -> dict[str, str]:
    """What runs, by path."""
    return {path: (ROOT / path).read_text() for path in tracked("*.py") if not path.startswith("tests/")}


def anchors(text: str) -> set[str]:
    """What a heading is linked by."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", tracked("*.md"))
def test_links_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text()
    for target, anchor in LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        file = (ROOT / path).parent / target if target else ROOT / path
        assert file.exists(), f"{path}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), f"{path}: {target}#{anchor}"


def test_each_decision_has_a_number_of_its_own() -> None:
    numbers: Counter[str] = Counter()
    for path in sorted((ROOT / "docs" / "adr").glob("*.md")):
        number = path.name.partition("-")[0]
        numbers[number] += 1
        assert path.read_text().startswith(f"# {int(number)}. "), path.name
    assert sorted(numbers) == [f"{at:04d}" for at in range(1, len(numbers) + 1)]
    assert set(numbers.values()) == {1}


def test_programs_of_the_readme_can_be_run() -> None:
    text = (ROOT / "README.md").read_text()
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert len(modules) > 10
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    scripts = re.findall(r"\./(scripts/\w+)", text)
    assert scripts
    for script in scripts:
        assert (ROOT / script).exists(), script


def options(*names: str) -> set[str]:
    """Of a command."""
    command = typer.main.get_command(cli.commands())
    for name in names:
        command = command.commands[name]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


def test_commands_and_options_of_the_readme_are_those_that_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    commands, knobs = text.split("## Commands and knobs")[1].split("| option of `up` |")
    told = set(re.findall(r"^\| `tracehaul ([\w-]+)", commands, re.MULTILINE))
    commands_here = typer.main.get_command(cli.commands()).commands  # type: ignore[attr-defined]
    there = {name for name, command in commands_here.items() if not command.hidden}
    assert told == there
    table = knobs.partition("\n\n")[0]
    said = {option for row in table.splitlines() for option in re.findall(r"`(--[a-z0-9-]+)", row.split("|")[1])}
    assert said == options("up") - {"--help", "-h"}
    store = commands.partition("| `tracehaul store COMMAND`")[2].partition("(")[0]
    assert set(re.findall(r"`(\w+)`", store)) == set(typer.main.get_command(cli.commands()).commands["store"].commands)  # type: ignore[attr-defined]


def test_log_lines_of_the_operators_are_those_that_are_written() -> None:
    table = (ROOT / "docs" / "operating.md").read_text().split("| line | who |")[1].partition("\n\n")[0]
    told = {line for row in table.splitlines()[2:] for line in re.findall(r"`([^`=]+)`", row.split("|")[1])}
    assert len(told) > 20
    written = code().values()
    for line in told:
        assert any(f'"{line}' in text for text in written), line


def test_nobody_logs_past_the_one_logger() -> None:
    loggers = [path for path, text in code().items() if "getLogger(" in text]
    assert loggers == [
        "bench/faults/corruption.py",  # makes others quiet
        "records/database.py",  # likewise
        "sim/run.py",  # listens to all of it
        "tracehaul/runtime/log.py",
    ]
