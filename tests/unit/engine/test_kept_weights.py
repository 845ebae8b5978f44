"""Weights that are kept are those that would be made, to the bit, or are made anew."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tracehaul.engine import kept_weights as module
from tracehaul.engine.kept_weights import kept_weights
from tracehaul.engine.weights import LayerWeights, Weights, load_weights
from tracehaul.model.source import ModelSource, resolve
from tracehaul.runtime import kept

CPU = torch.device("cpu")
HIDDEN, HEADS, KV_HEADS, MLP, VOCABULARY, LAYERS = 64, 4, 2, 96, 96, 2
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (MLP, HIDDEN),
    "ffn_up": (MLP, HIDDEN),
    "ffn_down": (HIDDEN, MLP),
}


def save_gguf(path: Path, seed: int = 1, *, tied: bool = True) -> ModelSource:
    """A tiny model of quantized matrices."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(MLP)
    writer.add_context_length(128)
    writer.add_block_count(LAYERS)
    writer.add_layer_norm_rms_eps(1e-5)
    random = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}.weight", HIDDEN)
        for name, shape in SHAPES.items():
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve(str(path))


def parts(weights: Weights) -> dict[str, Any]:
    """Everything in it by name, tensors as their kind, shape and bytes."""
    found: dict[str, Any] = {}
    owners: dict[str, Weights | LayerWeights] = {"": weights}
    owners |= {f"layers.{at}.": layer for at, layer in enumerate(weights.layers)}
    for prefix, owner in owners.items():
        for name in owner.__struct_fields__:
            value = getattr(owner, name)
            if isinstance(value, torch.Tensor):
                value = (value.dtype, tuple(value.shape), value.view(-1).view(torch.uint8).numpy().tobytes())
            if name != "layers":
                found[prefix + name] = value
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by each model that was made, and not read."""
    names: list[str] = []

    def load(source: ModelSource, *arguments: Any, **more: Any) -> Weights:
        names.append(source.name)
        return load_weights(source, *arguments, **more)

    monkeypatch.setattr(module, "load_weights", load)
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("int8", [True, False])
def test_they_are_the_same_to_the_bit(
    dtype: torch.dtype, tied: bool, int8: bool, tmp_path: Path, made: list[str]
) -> None:
    source = save_gguf(tmp_path / "tiny.gguf", tied=tied)
    expected = parts(load_weights(source, dtype, CPU, int8=int8))
    assert expected["config"].tied == tied
    for _ in range(2):
        got = kept_weights(source, dtype, CPU, tmp_path / "kept", int8=int8)
        assert parts(got) == expected
        assert (got.head is got.embedding) == tied
    assert made == ["tiny"]


def test_the_default_model_is_the_same_to_the_bit(tmp_path: Path, made: list[str]) -> None:
    source = resolve()
    expected = parts(load_weights(source, torch.bfloat16, CPU))
    assert parts(kept_weights(source, torch.bfloat16, CPU, tmp_path)) == expected
    assert parts(kept_weights(source, torch.bfloat16, CPU, tmp_path)) == expected
    assert len(made) == 1


def test_what_is_loaded_as_it_is_stored_is_not_kept(tmp_path: Path, made: list[str]) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(tmp_path / "model")
    source, folder = resolve(str(tmp_path / "model")), tmp_path / "kept"
    kept_weights(source, torch.bfloat16, CPU, folder)
    assert not folder.exists()
    rounded = [parts(kept_weights(source, torch.bfloat16, CPU, folder, int8=True)) for _ in range(2)]
    assert rounded[0] == rounded[1] == parts(load_weights(source, torch.bfloat16, CPU, int8=True))
    assert len(made) == 2


def test_one_file_of_a_model_and_form_stays_and_follows_the_source(tmp_path: Path, made: list[str]) -> None:
    folder = tmp_path / "kept"
    for seed in (1, 2):
        source = save_gguf(tmp_path / "tiny.gguf", seed)
        for dtype in (torch.bfloat16, torch.float32):
            for _ in range(2):
                got = kept_weights(source, dtype, CPU, folder)
                assert parts(got) == parts(load_weights(source, dtype, CPU))
    assert len(made) == 4
    assert len(list(folder.glob("tiny.*"))) == 2


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def replace_by_another_models(file: Path) -> None:
    other = file.parent / "other"
    kept_weights(save_gguf(file.parent / "tiny.gguf", 7), torch.bfloat16, CPU, other)
    (found,) = other.glob("tiny.*")
    found.replace(file)


@pytest.mark.parametrize(
    "harm",
    [
        flip,
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(b""),
        lambda file: kept.write(file, [b"\x04\0\0\0\0\0\0\0null"]),
        lambda file: kept.write(file, [(1 << 60).to_bytes(8, "little"), b"{}"]),
        replace_by_another_models,
    ],
    ids=["a-bit", "torn", "empty", "no-header", "no-size", "another-models"],
)
def test_a_damaged_file_is_made_anew(harm: Callable[[Path], object], tmp_path: Path, made: list[str]) -> None:
    source, folder = save_gguf(tmp_path / "tiny.gguf"), tmp_path / "kept"
    expected = parts(kept_weights(source, torch.bfloat16, CPU, folder))
    (file,) = folder.glob("tiny.*")
    harm(file)
    made.clear()
    for _ in range(2):
        assert parts(kept_weights(source, torch.bfloat16, CPU, folder)) == expected
    assert made == ["tiny"]


def test_where_nothing_can_be_kept_they_are_made(
    tmp_path: Path, made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = save_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").touch()
    for _ in range(2):
        got = kept_weights(source, torch.bfloat16, CPU, tmp_path / "file" / "kept")
        assert parts(got) == parts(load_weights(source, torch.bfloat16, CPU))
    assert len(made) == 2
    assert "weights are not kept" in caplog.text


def test_a_full_disk_is_a_warning(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, parts: object) -> None:
        raise OSError("no space left on device")

    source = save_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(module.kept, "write", refuse)
    got = kept_weights(source, torch.bfloat16, CPU, tmp_path / "kept")
    assert parts(got) == parts(load_weights(source, torch.bfloat16, CPU))
    assert "weights are not kept" in caplog.text


def test_of_many_at_once_one_makes_them(tmp_path: Path, made: list[str]) -> None:
    source, folder = save_gguf(tmp_path / "tiny.gguf"), tmp_path / "kept"
    expected = parts(load_weights(source, torch.bfloat16, CPU))
    got: list[dict[str, Any]] = []

    def load() -> None:
        got.append(parts(kept_weights(source, torch.bfloat16, CPU, folder)))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 4
    assert made == ["tiny"]


def test_who_waits_too_long_makes_them_and_writes_nothing(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = save_gguf(tmp_path / "tiny.gguf"), tmp_path / "kept"
    expected = parts(kept_weights(source, torch.bfloat16, CPU, folder))
    (file,) = folder.glob("tiny.*")
    (lock,) = folder.glob("lock*")
    file.unlink()
    monkeypatch.setattr(module, "WAIT_S", 0.1)
    with kept.alone(lock, 0.0) as is_ours:
        assert is_ours
        assert parts(kept_weights(source, torch.bfloat16, CPU, folder)) == expected
    assert not file.exists()
    assert len(made) == 2
