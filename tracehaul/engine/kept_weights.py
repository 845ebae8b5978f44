"""Weights that took work to make, kept in the form in which they are used: later loads map the file, and share it.

The file is one of :mod:`tracehaul.runtime.kept`: the size of a JSON header, the header, and the tensors, aligned. It is
found by the weights' revision, a hash of the bytes that they are made of: what is there is what would be made.
"""

import glob
import math
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from blake3 import blake3

from tracehaul.engine.weights import LayerWeights, Weights, identify, load_weights
from tracehaul.model.model_config import ModelConfig
from tracehaul.model.source import ModelSource
from tracehaul.runtime import clock, kept
from tracehaul.runtime.log import Log

log = Log(__name__)

FORMAT = 1
"""To be raised when the form changes, or which numbers are made of a model's files."""
WAIT_S = 120.0
"""For another process that makes the same; after that this one makes them for itself."""
FILES_MAX = 16
"""Of all models."""
ALIGNMENT = 64
_SIZE_BYTES = 8
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
_DTYPES["int8"] = torch.int8
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NO_TENSORS = ("config", "revision", "dtype", "layers", "window", "rope")
_SHARED = ("head", "head_scales")
"""Those of the embedding, where they are tied."""


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Behind the header."""


class _Header(msgspec.Struct, frozen=True):
    format: int
    form: str
    revision: str
    tensors: dict[str, _Tensor]


def kept_weights(
    source: ModelSource, dtype: torch.dtype, device: torch.device, folder: Path, *, int8: bool = False
) -> Weights:
    """As :func:`tracehaul.engine.weights.load_weights`; what had to be dequantized or rounded is kept in ``folder``.

    One process makes it and others wait for it. Where it cannot be kept, each load makes it.

    Raises:
        SourceError: see there.
    """
    if source.kind != "gguf" and not int8:
        return load_weights(source, dtype, device)
    config, revision = identify(source, int8=int8)
    form = f"{source.path.stem}.{_NAMES[dtype]}{'.int8' if int8 else ''}"
    path = folder / f"{form}.{revision}"
    found = _read(path, form, config, revision, dtype)
    if found is None:
        with _turn(folder, form) as is_ours:
            found = _read(path, form, config, revision, dtype) if is_ours else None
            if found is None:
                found = load_weights(source, dtype, torch.device("cpu"), int8=int8)
                if is_ours and found.revision == revision and _write(path, form, found):
                    found = _read(path, form, config, revision, dtype) or found
    return found if device.type == "cpu" else _each(found, lambda tensor: tensor.to(device))


@contextmanager
def _turn(folder: Path, form: str) -> Generator[bool]:
    """Whether to keep what the caller makes: nobody else makes it now."""
    lock = folder / f"lock-{blake3(form.encode()).hexdigest()[0]}"  # not one for each model that there ever was
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        log.warning("weights are not kept: each start makes them", folder=folder, reason=error)
        yield False
        return
    with kept.alone(lock, WAIT_S) as is_ours:
        if not is_ours:
            log.warning("not waiting longer for another process that makes the same weights", waited_s=WAIT_S)
        yield is_ours


# --- the file -----------------------------------------------------------------------------------------------


def _write(path: Path, form: str, weights: Weights) -> bool:
    """Whether it is there now; then it is the only one of its form."""
    began_s = clock.perf_s()
    named = dict(_tensors(weights))
    places: dict[str, _Tensor] = {}
    end = 0
    for name, tensor in named.items():
        places[name] = _Tensor(_NAMES[tensor.dtype], tuple(tensor.shape), end)
        end = _aligned(end + tensor.nbytes)
    header = msgspec.json.encode(_Header(FORMAT, form, weights.revision, places))
    try:
        if shutil.disk_usage(path.parent).free < 2 * end:
            raise OSError(f"less than {2 * end / 1e6:.0f} MB of disk are free")
        kept.write(path, _file_parts(header, list(named.values())))
        revision = "?" * len(weights.revision)
        kept.forget_old(path.parent, f"{glob.escape(form)}.{revision}*", 1)
        kept.forget_old(path.parent, f"*.{revision}", FILES_MAX)
    except OSError as error:
        log.warning("weights are not kept: each start makes them", path=path, reason=error)
        return False
    log.info("kept weights in the form that is used", path=path, mb=end / 1e6, seconds=clock.perf_s() - began_s)
    return True


def _file_parts(header: bytes, tensors: list[torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(_SIZE_BYTES, "little")
    yield header
    yield bytes(_data_start(len(header)) - _SIZE_BYTES - len(header))
    for tensor in tensors:
        # bfloat16 is unknown to numpy.
        yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        yield bytes(_aligned(tensor.nbytes) - tensor.nbytes)


def _read(path: Path, form: str, config: ModelConfig, revision: str, dtype: torch.dtype) -> Weights | None:
    """None: it is not there, or is not what its name says."""
    content = kept.read(path)
    if content is None:
        return None
    size = int.from_bytes(content[:_SIZE_BYTES], "little")
    try:
        header = msgspec.json.decode(content[_SIZE_BYTES : _SIZE_BYTES + size], type=_Header)
        if (header.format, header.form, header.revision) != (FORMAT, form, revision):
            return None
        data = content[_data_start(size) :]
        tensors = {name: _tensor(data, place) for name, place in header.tensors.items()}
        return _weights(tensors, config, revision, dtype)
    except (msgspec.MsgspecError, KeyError, ValueError):
        return None


def _tensor(data: memoryview, place: _Tensor) -> torch.Tensor:
    count = math.prod(place.shape)
    return torch.frombuffer(data, dtype=_DTYPES[place.dtype], count=count, offset=place.offset).view(place.shape)


def _data_start(header_bytes: int) -> int:
    return _aligned(_SIZE_BYTES + header_bytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# --- names of tensors ---------------------------------------------------------------------------------------


def _tensors(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """All, once each."""
    owners: list[tuple[str, Weights | LayerWeights]] = [("", weights)]
    owners += [(f"{at}.", layer) for at, layer in enumerate(weights.layers)]
    for prefix, owner in owners:
        for name in owner.__struct_fields__:
            tensor = getattr(owner, name)
            if isinstance(tensor, torch.Tensor) and not (weights.config.tied and name in _SHARED):
                yield prefix + name, tensor


def _weights(tensors: dict[str, torch.Tensor], config: ModelConfig, revision: str, dtype: torch.dtype) -> Weights:
    def of(kind: type[Weights | LayerWeights], prefix: str) -> dict[str, torch.Tensor | None]:
        return {name: tensors.get(prefix + name) for name in kind.__struct_fields__ if name not in _NO_TENSORS}

    layers = [
        LayerWeights(**of(LayerWeights, f"{at}."), window=kind.window, rope=kind.rope)  # pyright: ignore[reportArgumentType] - those that must not be None were not
        for at, kind in enumerate(config.kinds)
    ]
    own = of(Weights, "")
    if config.tied:
        own |= {"head": own["embedding"], "head_scales": own["embedding_scales"]}
    return Weights(config=config, revision=revision, dtype=dtype, layers=layers, **own)  # pyright: ignore[reportArgumentType]


def _each(weights: Weights, change: Callable[[torch.Tensor], torch.Tensor]) -> Weights:
    """All tensors changed."""
    changed = {name: change(tensor) for name, tensor in _tensors(weights)}
    return _weights(changed, weights.config, weights.revision, weights.dtype)
