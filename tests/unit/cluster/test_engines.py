"""Pools of other engines in the config, and models that only those run."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cluster.config import ClusterConfig, PoolConfig
from cluster.config_file import load_config
from cluster.engines import dialect_of, layout_file, stock_seat
from cluster.model import model_size, stock_layout
from cluster.plan import NodeSpec, PoolPlan
from cluster.rundir import ClusterFault, RunDir
from engines.adapter.dialect import Facts
from engines.vllm.adapter import VLLM
from tests.seats import INFO
from tests.stock import Listening, StockEngine
from tests.stock_sglang import SGLangServer
from tracehaul.model.source import ModelSource, SourceError, resolve
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.ids import Generation, NodeId


def folder(path: Path, **said: Any) -> str:
    (path / "config.json").write_bytes(msgspec.json.encode({"architectures": ["OtherForCausalLM"]} | said))
    return str(path)


@pytest.mark.parametrize(
    ("said", "token_bytes"),
    [
        ({"num_hidden_layers": 48, "num_key_value_heads": 4, "num_attention_heads": 32, "head_dim": 128}, 48 * 2048),
        ({"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512}, 2 * 2 * 512 * 2),
        ({"text_config": {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8}}, 3 * 2 * 8 * 2),
        # One vector for all heads, half of it as keys.
        ({"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 61 * 1152),
    ],
)
def test_blocks_of_a_model_that_only_others_run_have_a_size(
    tmp_path: Path, said: dict[str, Any], token_bytes: int
) -> None:
    model = folder(tmp_path, **said)
    with pytest.raises(SourceError, match="OtherForCausalLM is not supported"):
        resolve(model)
    source = resolve(model, foreign=True)
    assert stock_layout(source, "bfloat16").token_bytes == token_bytes
    size = model_size(source, PoolConfig(model=model, engine="vllm"), "bfloat16")
    assert (size.weights_bytes, size.token_bytes) == (0, token_bytes)
    with pytest.raises(ClusterFault, match="not one that our own engine runs"):
        model_size(source, PoolConfig(model=model), "bfloat16")


def test_a_model_that_does_not_say_how_large_its_kv_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterFault, match="how large its KV is"):
        stock_layout(resolve(folder(tmp_path), foreign=True), "bfloat16")


def test_a_pool_says_its_engine_and_an_own_one_takes_no_options_of_others(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        '[pools.a]\nmodel = "m"\nengine = "sglang"\nengine_args = ["--tp", "2"]\n[pools.a.adapter]\npoll_s = 2.0\n'
    )
    pool = load_config(file, {}).pools["a"]
    assert (pool.engine, pool.engine_args, pool.adapter.poll_s) == ("sglang", ("--tp", "2"), 2.0)
    file.write_text('[pools.a]\nmodel = "m"\nengine_python = "/opt/vllm/bin/python"\n')
    with pytest.raises(ClusterFault, match="are of other engines: say engine"):
        load_config(file, {})
    file.write_text('[pools.a]\nmodel = "m"\nengine = "tensorrt"\n')
    with pytest.raises(ClusterFault, match="tensorrt"):
        load_config(file, {})


@pytest.mark.parametrize(
    ("args", "started", "goes_by_them"),
    [
        (("--scheduling-policy", "priority"), False, True),
        (("--scheduling-policy=priority",), False, True),
        (("--x",), False, False),
        (("--x",), True, True),
        (("--scheduling-policy", "fcfs"), True, False),
        (("--scheduling-policy=fcfs",), True, False),
    ],
)
def test_priorities_go_to_a_server_that_was_started_for_them(
    args: tuple[str, ...], *, started: bool, goes_by_them: bool
) -> None:
    dialect = dialect_of("vllm", args, started=started)
    assert isinstance(dialect, VLLM)
    models = b'{"data": [{"id": "m", "max_model_len": 8}]}'
    facts: Facts = dialect.facts([models, b'{"version": "0.32.0"}', b""])
    assert facts.priorities == goes_by_them


def attached(folder: Path, name: str, model: str, path: str = "/elsewhere") -> NodeInfo:
    """What a worker announces over a server of ``/models/fake``, called ``fake``."""

    async def main() -> NodeInfo:
        listening = await Listening(SGLangServer(StockEngine()).app()).start()
        config = PoolConfig(model=model, engine="sglang", attach={"decode-a-0": listening.url})
        pool = PoolPlan("a", ModelSource(name, Path(path), "hf", "foreign"), config)
        plan: Any = SimpleNamespace(pool=lambda _: pool, config=ClusterConfig())
        spec = NodeSpec("decode-a-0", "decode", pool="a")
        info = NodeInfo(NodeId("decode-a-0"), Generation(1), "decode", "decode-a-0:1")
        try:
            async with AsyncExitStack() as stack:
                peers = Peers(LocalNetwork().at("decode-a-0:1"))
                member = await stock_seat(stack, info, plan, spec, RunDir(folder), peers, lambda **_: None)
                return member.info
        finally:
            await listening.kill()

    return asyncio.run(main())


def test_a_server_of_another_model_is_not_attached_to(tmp_path: Path) -> None:
    for said in (("fake", "org/x"), ("a", "/models/fake"), ("a", "org/x", "/models/fake"), ("a", "fake")):
        assert attached(tmp_path, *said).model == said[0]
    told = r"serves 'fake' from /models/fake, and not 'a': .*--served-model-name a"
    with pytest.raises(ClusterFault, match=told):
        attached(tmp_path, "a", "org/x")


def test_what_a_started_server_has_left_is_not_of_one_that_is_attached(tmp_path: Path) -> None:
    layout = msgspec.json.encode(INFO.layout)
    alone = attached(tmp_path, "fake", "fake").root
    layout_file(RunDir(tmp_path), "decode-a-0", started=True).write_bytes(layout)
    assert attached(tmp_path, "fake", "fake").root == alone != INFO.layout.root()
    layout_file(RunDir(tmp_path), "decode-a-0", started=False).write_bytes(layout)
    assert attached(tmp_path, "fake", "fake").root == INFO.layout.root()
