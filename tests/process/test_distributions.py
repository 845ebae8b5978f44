"""Two distributions from one repository: the store alone, and the rest, which needs it."""

import json
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tracehaul import __version__

REPO = Path(__file__).parents[2]
ROOMS = [
    "tracehaul",
    "kvstore",
    "records",
    "worker",
    "prefill",
    "decode",
    "engines",
    "jobs",
    "router",
    "cluster",
    "sim",
    "bench",
]
OF_THE_STORE = (
    "engines/__init__.py",
    "engines/blocks/",
    "engines/sglang/__init__.py",
    "engines/sglang/plugin.py",
    "engines/vllm/__init__.py",
    "engines/vllm/chains.py",
    "engines/vllm/paging.py",
    "engines/vllm/plugin.py",
    "engines/vllm/saving.py",
    "engines/vllm/scheduling.py",
    "kvstore/",
    "tracehaul/__init__.py",
    "tracehaul/rpc/",
    "tracehaul/runtime/",
    "tracehaul/transfer/",
    "tracehaul/wire/",
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributions")]


class Wheel:
    """One built wheel."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with ZipFile(file) as archive:
            names = archive.namelist()
            self.modules = {n: archive.read(n) for n in names if ".dist-info/" not in n}
            (self._metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))

    @property
    def metadata(self) -> Message:
        return Parser().parsestr(self._metadata)

    @property
    def requirements(self) -> list[Requirement]:
        """What is installed with it, if no extra is asked for."""
        given = map(Requirement, self.metadata.get_all("Requires-Dist", []))
        return [r for r in given if r.marker is None or r.marker.evaluate({"extra": ""})]


def build(project: Path, out: Path, target: str) -> Path:
    """The one file that was built."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), "-t", target]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return Wheel(build(REPO / "store", tmp_path_factory.mktemp("store"), "wheel"))


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return Wheel(build(REPO, tmp_path_factory.mktemp("rest"), "wheel"))


def modules() -> Iterator[str]:
    for room in ROOMS:
        for path in (REPO / room).rglob("*.py"):
            yield path.relative_to(REPO).as_posix()


def test_every_module_is_in_one_of_the_two(store: Wheel, rest: Wheel):
    assert not store.modules.keys() & rest.modules.keys()
    found = {name for name in store.modules | rest.modules if name.endswith(".py")}
    assert sorted(found) == sorted(modules())
    assert {name for name in modules() if name.startswith(OF_THE_STORE)} == set(store.modules)


def test_the_store_asks_for_little_and_the_rest_for_this_store(store: Wheel, rest: Wheel):
    assert {r.name for r in store.requirements} == {"blake3", "msgspec", "numpy", "xxhash"}
    assert {wheel.metadata["Version"] for wheel in (store, rest)} == {__version__}
    assert store.metadata["Requires-Python"] == rest.metadata["Requires-Python"]
    needed = {r.name: r for r in rest.requirements}
    assert str(needed["tracehaul-store"].specifier) == f"=={__version__}"
    extras = set(store.metadata.get_all("Provides-Extra", []))
    assert needed["tracehaul-store"].extras < extras


def test_the_tested_torch_is_one_of_those_allowed(rest: Wheel):
    allowed = next(r.specifier for r in rest.requirements if r.name == "torch")
    tested = Requirement((REPO / "constraints.txt").read_text().strip())
    (version,) = (one.version for one in tested.specifier)
    assert tested.name == "torch"
    assert version in allowed
    assert "2.14.1" in allowed, "a range, not one version"


@pytest.mark.parametrize("name", ["store", "rest"])
def test_a_source_distribution_builds_the_same_wheel(request: pytest.FixtureRequest, tmp_path: Path, name: str):
    wheel: Wheel = request.getfixturevalue(name)
    archive = build(REPO / "store" if name == "store" else REPO, tmp_path / "sdist", "sdist")
    with tarfile.open(archive) as sources:
        assert all(member.isfile() or member.isdir() for member in sources), "a link leads nowhere once unpacked"
        sources.extractall(tmp_path)
    project = tmp_path / PurePosixPath(archive.name.removesuffix(".tar.gz")).name
    assert Wheel(build(project, tmp_path / "wheel", "wheel")).modules == wheel.modules


def test_the_store_alone_stores_a_block(store: Wheel, tmp_path: Path):
    with ZipFile(store.file) as archive:
        archive.extractall(tmp_path)
    # -S: no .pth file leads to this checkout. The site-packages are for numpy and the like.
    script, packages = Path(__file__).with_name("store_alone.py"), sysconfig.get_path("purelib")
    command = [sys.executable, "-I", "-S", str(script), str(tmp_path), packages]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["from"] == str(tmp_path / "kvstore" / "client" / "__init__.py")
    loaded = {name.partition(".")[0] for name in told["loaded"]}
    assert not loaded & {"torch", "numba", "starlette", "llvmlite", "uvloop", "nixl", "ucxx", "obstore"}
    assert told["blocks"] == {kind: ["published", 1 << 20, True] for kind in ("shm", "tcp")}
    for extra, error in told["errors"].items():
        assert error.endswith(f"pip install tracehaul-store[{extra}]")
