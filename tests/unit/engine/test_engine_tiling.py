"""Which products are chosen for which processor, and that what is written for all of them becomes code for ARM."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from llvmlite import binding, ir
from numba import types

from tracehaul.engine.cpu import panels, products
from tracehaul.engine.cpu.tiling import LANES, Tiling, tiling
from tracehaul.engine.cpu.vectors import FLOATS, I64, exp2, settle

AVX2 = "+avx,+avx2,+fma,+f16c,-avx512f,-avx512bf16"
NEON = tiling("aarch64", "+neon,+fp-armv8,+bf16")
PROCESSORS = {
    "zen4": (tiling("x86_64", "+avx2,+avx512f,+avx512bf16"), 32),
    "skylake-server": (tiling("x86_64", "+avx2,+avx512f,-avx512bf16"), 32),
    "haswell": (tiling("x86_64", AVX2), 16),
    "named": (tiling("x86_64", ""), 16),
    "graviton": (NEON, 32),
    "nobody knows": (tiling("riscv64", ""), 32),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_multiplied_at_once_fits_the_registers(name: str) -> None:
    chosen, registers = PROCESSORS[name]
    vectors = LANES // chosen.lanes
    # Sums, then a vector of each row of weights and one of the other rows; or sums, weights and one number.
    assert chosen.outputs * chosen.rows * vectors + chosen.outputs + 1 <= registers
    for rows, times in ((6, 1), (3, 2), (1, 4)):
        parts = vectors * min(4, chosen.columns * times)
        assert rows * parts + min(rows, parts) + 1 <= registers
    assert LANES % chosen.outputs == 0 == LANES % chosen.lanes


def test_a_processor_is_told_by_its_features() -> None:
    assert [name for name, (chosen, _) in PROCESSORS.items() if chosen.pairs] == ["zen4"]
    lanes = [chosen.lanes for chosen, _ in PROCESSORS.values()]
    assert lanes == [16, 16, 8, 8, 4, 4]
    assert PROCESSORS["haswell"] == PROCESSORS["named"]
    assert tiling("x86_64", AVX2).words == "float32, 8 lanes, 2x3"


def code_for_arm(signature: Any, generate: Any) -> str:
    """Assembly of a word as a function of its own; vectors are given and taken by their addresses."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * (1 + len(signature.args))), "word")
    builder = ir.IRBuilder(function.append_basic_block())
    given = [
        builder.load(builder.inttoptr(place, FLOATS.as_pointer())) if str(kind) == "f32x16" else place
        for kind, place in zip(signature.args, function.args[1:], strict=True)
    ]
    context = SimpleNamespace(get_dummy_value=lambda: None)
    result = generate(context, builder, signature, given)
    if result is not None:
        builder.store(result, builder.inttoptr(function.args[0], result.type.as_pointer()))
    builder.ret_void()
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu="neoverse-n1", features="+neon", opt=3)
    module.triple = machine.triple
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    binding.create_pass_builder(machine, options).getModulePassManager().run(
        parsed, binding.create_pass_builder(machine, options)
    )
    assert machine.emit_object(parsed).startswith(b"\x7fELF")
    return machine.emit_assembly(parsed)


def loop_of(code: str) -> str:
    """The part that jumps back to its own beginning."""
    found = re.search(r"^(\.LBB\d+_\d+):(?:(?!^\.LBB).)*?\tb\.\w+\t\1$", code, re.DOTALL | re.MULTILINE)
    assert found is not None, code
    return found[0]


@pytest.fixture
def on_arm(monkeypatch: pytest.MonkeyPatch) -> Tiling:
    for module in (panels, products):
        monkeypatch.setattr(module, "TILING", NEON)
    return NEON


@pytest.mark.parametrize("kind", [types.float32, types.uint16, types.int8], ids=str)
def test_cells_become_multiplications_of_four_in_registers(kind: Any, on_arm: Tiling) -> None:
    signature = types.void(*[types.int64] * 8, kind)
    loop = loop_of(code_for_arm(signature, panels.ir_cells(on_arm.outputs, on_arm.rows, True)))
    # Two vectors of 16 at a time.
    assert len(re.findall(r"\tfmla\tv\d+\.4s", loop)) == 2 * 4 * on_arm.outputs * on_arm.rows
    assert "prfm" in loop
    assert "[sp" not in loop


def test_attentions_products_stay_in_registers(on_arm: Tiling) -> None:
    signature = types.void(*[types.int64] * 7, types.float32)
    loop = loop_of(code_for_arm(signature, products.ir_tiles(6, on_arm.columns, fresh=False)))
    assert len(re.findall(r"\tfmla\tv\d+\.4s", loop)) == 6 * 4 * on_arm.columns
    assert "[sp" not in loop


def test_the_other_words_become_code(on_arm: Tiling) -> None:
    words: list[tuple[Any, list[Any]]] = [
        (panels.fold, [types.int64]),
        (products.transpose, [*[types.int64] * 4, types.uint16]),
        (products.interleave, [types.int64] * 3),
        (exp2, [panels.vector]),
        (settle, [panels.vector, types.uint16, types.float32]),
    ]
    for word, kinds in words:
        signature, generate = word._defn(None, *kinds)
        assert "word:" in code_for_arm(signature, generate)
