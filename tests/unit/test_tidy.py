"""The house stays tidy: files of a sitting, functions of a screen, and what says that it is pure is held to it."""

import ast
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70

LONG_FILES = {
    "kvstore/tiers/slots.py": "one table: what a slot is in is decided in one place",
    "tracehaul/engine/fake.py": "an engine, and the oracle of what it says",
    "tracehaul/engine/torch_engine.py": "its seams are not cut yet",
    "tracehaul/transfer/exchange.py": "one protocol, both of its ends",
    "tracehaul/transfer/ucxx.py": "one protocol, both of its ends",
    "tracehaul/wire/blocks.py": "a list of messages",
    "bench/faults/corruption.py": "a list of ways to corrupt",
    "cluster/metric_names.py": "a list of metrics",
    "tests/contract/test_engine.py": "one suite for every engine",
    "tests/contract/test_kvstore.py": "one suite for every transport",
    "tests/contract/test_rpc.py": "one suite for every network",
    "tests/contract/test_store_tiers.py": "one suite for every tier",
    "tests/contract/test_tiers.py": "one suite for every tier",
    "tests/contract/test_transfer.py": "one suite for every transport",
    "tests/sim/test_store_replicas.py": "one world, many endings",
    "tests/unit/kvstore/test_arena.py": "one table's cases",
    "tests/unit/kvstore/test_arena_model.py": "one state machine",
    "tests/unit/router/http/test_calls.py": "one endpoint's cases",
    "tests/unit/router/test_traces_model.py": "one state machine",
    "tests/unit/transfer/test_transfer_exchange.py": "one protocol's cases",
}
LONG_FUNCTIONS = {
    "bench/replay/command.py:replay_command": "a list of options",
    "cluster/cli.py:up": "a list of options",
    "tracehaul/engine/cpu/attending.py:attend_span": "a kernel, whose registers are counted",
    "tracehaul/engine/paged_attention.py:_attend": "a kernel of Triton, whose loops share what they hold in registers",
}


def sources() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split() if (ROOT / path).exists()]


def test_a_file_is_read_in_one_sitting() -> None:
    lines = {path: (ROOT / path).read_text().count("\n") for path in sources()}
    long = {path for path, count in lines.items() if count > FILE_LINES_MAX}
    assert long == LONG_FILES.keys(), "cut it at a seam, or name the reason; take out what is short again"


def test_a_function_is_seen_on_one_screen() -> None:
    long: set[str] = set()
    for path in sources():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX:
                    long.add(f"{path}:{node.name}")
    assert long == LONG_FUNCTIONS.keys(), "cut it at a seam, or name the reason; take out what is short again"


def pure_contract() -> set[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return set(next(c for c in contracts if c["name"] == "Pure modules stay pure")["source_modules"])


@pytest.mark.parametrize("path", [path for path in sources() if not path.startswith("tests/")])
def test_what_says_that_it_is_pure_is_held_to_it(path: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    if "Pure." not in text and "Pure;" not in text and not text.endswith("pure."):
        return
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    names = module.split(".")
    covering = {".".join(names[:count]) for count in range(1, len(names) + 1)}
    assert covering & pure_contract(), f"{module} says that it is pure: list it in the import contract"


@pytest.mark.xdist_group("together")
def test_processes_of_the_suite_keep_groups_together(request: pytest.FixtureRequest) -> None:
    """xdist knows a group by the end of its tests' names. Where it cannot change those, each process makes what a group
    shares for itself, in silence."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("not distributed by groups")
    assert request.node.nodeid.endswith("@together"), "install the pytest and pytest-xdist that pyproject.toml asks for"
