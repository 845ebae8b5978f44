"""A stock server as a process: stands where its worker expects the interpreter that has one installed.

What it is told is what the worker tells the real one; SGLang's or vLLM's module says which it is.
"""

import asyncio
import os
import sys
from itertools import pairwise
from pathlib import Path

import msgspec

from tests.stock import Listening, StockEngine
from tests.stock_sglang import SGLangServer
from tests.stock_vllm import VLLMServer
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info

VOCABULARY = 49_152
"""Of the model whose tokenizer the router has."""


async def main(arguments: list[str]) -> None:
    said = dict(pairwise(arguments))
    engine = StockEngine()
    cost = EngineCost(iteration_s=float(os.environ.get("STOCK_ITERATION_S", "0.0")))
    engine.engine = FakeEngine(fake_info(vocab_size=VOCABULARY, kv_tokens_max=16384), cost)
    engine.model = said.get("--served-model-name", engine.model)
    server = SGLangServer(engine) if said["-m"] == "sglang.launch_server" else VLLMServer(engine)
    noted = {"arguments": arguments, "pid": os.getpid()}
    Path(os.environ["STOCK_NOTES"]).write_bytes(msgspec.json.encode(noted))  # noqa: ASYNC240 - nothing runs yet
    # What its schedulers would be.
    await asyncio.create_subprocess_exec("sleep", "3600")
    await Listening(server.app(), int(said["--port"])).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
