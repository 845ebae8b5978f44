"""Random JSON schemas over the real vocabulary: every answer that ends matches its schema."""

import asyncio
import random

import pytest

from bench.engine.schemas import random_schema
from bench.engine.structured import Scribbler, answers, valid
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.model.source import resolve
from tracehaul.model.text import Text

pytestmark = pytest.mark.slow

SCHEMAS = 50
BY_MODEL = 16


def test_every_random_answer_that_ends_matches_its_schema() -> None:
    source = random.Random(11)
    schemas = [random_schema(source) for _ in range(SCHEMAS)]

    async def main() -> list[str | None]:
        scribbler = Scribbler(Text.load(resolve()), 11)
        try:
            return [await scribbler.answer(schema) for schema in schemas]
        finally:
            scribbler.close()

    ended = [(schema, answer) for schema, answer in zip(schemas, asyncio.run(main()), strict=True) if answer]
    assert len(ended) > SCHEMAS // 2
    assert not [(schema, answer) for schema, answer in ended if not valid(schema, answer)]


def test_every_answer_of_the_model_that_ends_matches_its_schema() -> None:
    source = random.Random(1)
    schemas = [random_schema(source) for _ in range(BY_MODEL)]

    async def main() -> list[str | None]:
        engine = await TorchEngine.load(TorchEngineConfig(kv_tokens_max=16_384))
        try:
            return await answers(engine, Text.load(resolve()), schemas, 1)
        finally:
            await engine.aclose()

    ended = [(schema, answer) for schema, answer in zip(schemas, asyncio.run(main()), strict=True) if answer]
    assert ended
    assert not [(schema, answer) for schema, answer in ended if not valid(schema, answer)]
