"""What the code looks like, by its syntax trees: nothing is imported or run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
ROOMS = ("tracehaul", "kvstore", "worker", "prefill", "decode", "engines", "jobs", "router", "cluster", "sim", "bench")


def trees(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    """Every file below these, relative to the house."""
    for folder in folders:
        for path in sorted((HOUSE / folder).rglob("*.py")):
            yield path.relative_to(HOUSE), ast.parse(path.read_bytes())


# --- who builds what ----------------------------------------------------------------------------------------


def callers(name: str) -> list[str]:
    found: list[str] = []
    for path, tree in trees(*ROOMS, "tests"):
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        if any(name in (getattr(called, "id", None), getattr(called, "attr", None)) for called in calls):
            found.append(str(path))
    return found


def test_one_place_builds_a_store_node() -> None:
    assert callers("StoreNode") == ["kvstore/node/assemble.py"]


# --- circles ------------------------------------------------------------------------------------------------


def imports(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """The modules that a file names anywhere: in functions and for the type checker, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert not node.level, "relative imports are not read here"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in submodules if name in modules)
            if node.module in modules and not all(name in modules for name in submodules):
                yield node.module


def circles(graph: dict[str, list[str]]) -> list[list[str]]:
    """Strongly connected components of more than one, or of one that names itself (Tarjan, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()
    found: list[list[str]] = []
    for root in graph:
        work = [(root, iter(graph[root]))] if root not in index else []
        while work:
            node, targets = work[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                path.append(node)
                on_path.add(node)
            for target in targets:
                if target not in index:
                    work.append((target, iter(graph[target])))
                    break
                if target in on_path:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    at = path.index(node)
                    component, path = path[at:], path[:at]
                    on_path.difference_update(component)
                    if len(component) > 1 or node in graph[node]:
                        found.append(sorted(component))
    return sorted(found)


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": ["b", "c"], "b": ["c"], "c": []}, []),
        ({"a": ["b"], "b": ["a"]}, [["a", "b"]]),
        ({"a": ["a"]}, [["a"]]),
        ({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": ["e"], "e": ["f"], "f": ["d"]}, [["b", "c"], ["d", "e", "f"]]),
    ],
)
def test_circles_are_found(graph: dict[str, list[str]], expected: list[list[str]]) -> None:
    assert circles(graph) == expected


def test_no_circle_of_imports() -> None:
    files = {".".join(path.with_suffix("").parts): tree for path, tree in trees(*ROOMS)}
    files = {name.removesuffix(".__init__"): tree for name, tree in files.items()}
    graph = {name: sorted(set(imports(tree, set(files)))) for name, tree in files.items()}
    assert sum(map(len, graph.values())) > len(graph), "hardly any import was found"
    found = circles(graph)
    assert not found
