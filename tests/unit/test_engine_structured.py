"""Random JSON schemas on the real model: every answer that ends matches its schema."""

import asyncio
import random

import pytest

from bench.schemas import random_schema
from bench.structured import answers, valid
from tracehaul.engine.source import resolve
from tracehaul.engine.text import Text
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCHEMAS = 48


def test_every_answer_that_ends_matches_its_schema() -> None:
    source = random.Random(11)
    schemas = [random_schema(source) for _ in range(SCHEMAS)]

    async def main() -> list[str | None]:
        engine = await TorchEngine.load(TorchEngineConfig(kv_tokens_max=16_384))
        try:
            return await answers(engine, Text.load(resolve()), schemas, 11)
        finally:
            await engine.aclose()

    ended = [(schema, answer) for schema, answer in zip(schemas, asyncio.run(main()), strict=True) if answer]
    assert len(ended) > SCHEMAS // 4
    assert not [(schema, answer) for schema, answer in ended if not valid(schema, answer)]
