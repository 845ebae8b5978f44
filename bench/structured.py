"""Does every answer that ends match its schema? Random schemas, the default model, and jsonschema as the judge."""

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from jsonschema import Draft202012Validator
from rich.console import Console
from rich.progress import Progress

from bench.report import Result, finish
from bench.schemas import random_schema
from tracehaul.engine.base import Engine, Work
from tracehaul.engine.source import DEFAULT_MODEL, resolve
from tracehaul.engine.text import Text
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import Constraint, Sampling

BATCH = 16
OUTPUT_TOKENS = 128
PROMPT_CHARACTERS = 400
KV_TOKENS = 16_384

console = Console()


async def answers(engine: Engine, text: Text, schemas: Sequence[dict[str, Any]], seed: int) -> list[str | None]:
    """What the model answers to each schema, all at once; None where it did not end within the limit.

    Raises:
        InvalidRequest: a schema cannot be used.
    """
    found: list[str | None] = [None] * len(schemas)
    outputs: list[list[int]] = [[] for _ in schemas]
    feeds: dict[int, Work] = {}
    for at, schema in enumerate(schemas):
        said = f"Answer with JSON that matches this schema: {json.dumps(schema)[:PROMPT_CHARACTERS]}"
        prompt = text.encode(text.render([{"role": "user", "content": said}]))
        sequence = engine.open(len(prompt) + OUTPUT_TOKENS)
        assert sequence is not None, "the bench's prompts do not fit the KV memory"
        constraint = Constraint("json_schema", json.dumps(schema))
        sampling = Sampling(OUTPUT_TOKENS, seed=seed + at, stop_tokens=text.eos_tokens, constraint=constraint)
        feeds[at] = Work(sequence, prompt, sampling, guide=await engine.guide(constraint, []))
    while feeds:
        results = await engine.run(list(feeds.values()))
        for (at, work), result in zip(list(feeds.items()), results, strict=True):
            if result.token is not None and result.token not in text.eos_tokens:
                outputs[at].append(result.token)
                if len(outputs[at]) < OUTPUT_TOKENS:
                    feeds[at] = Work(work.sequence, [result.token], work.sampling, len(outputs[at]), guide=work.guide)
                    continue
            elif result.token is not None:
                found[at] = text.raw(outputs[at])
            else:
                raise InvalidRequest(result.error)
            engine.close(work.sequence)
            del feeds[at]
    return found


def valid(schema: dict[str, Any], answer: str) -> bool:
    """Whether an answer is JSON that matches its schema, formats included."""
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).is_valid(value)


async def measure(count: int, seed: int, progress: Progress) -> list[Result]:
    """Answers to ``count`` schemas: how many ended, and how many of those are wrong."""
    source = random.Random(seed)
    text = Text.load(resolve())
    engine = await TorchEngine.load(TorchEngineConfig(kv_tokens_max=KV_TOKENS))
    bar = progress.add_task("schemas", total=count)
    ended = wrong = refused = 0
    try:
        for start in range(0, count, BATCH):
            batch: list[dict[str, Any]] = []
            for schema in [random_schema(source) for _ in range(min(BATCH, count - start))]:
                try:
                    await engine.guide(Constraint("json_schema", json.dumps(schema)), [])
                    batch.append(schema)
                except InvalidRequest as error:
                    refused += 1
                    console.print(f"refused: {error}")
            for schema, answer in zip(batch, await answers(engine, text, batch, seed + start), strict=True):
                if answer is None:
                    continue
                ended += 1
                if not valid(schema, answer):
                    wrong += 1
                    console.print(f"wrong: {json.dumps(schema)}\n{answer}", markup=False)
            progress.advance(bar, min(BATCH, count - start))
    finally:
        await engine.aclose()
    return [
        Result("structured.ended", ended, f"of {count} answers"),
        Result("structured.refused", refused, "schemas"),
        Result("structured.wrong", wrong, f"of {ended} that ended"),
    ]


def main(
    schemas: Annotated[int, typer.Option(help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the schemas and of sampling.")] = 1,
    report: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Answer random schemas, and check every answer that ends."""
    with Progress(console=console) as progress:
        results = asyncio.run(measure(schemas, seed, progress))
    config = {"model": DEFAULT_MODEL, "schemas": schemas, "seed": seed, "output_tokens": OUTPUT_TOKENS, "batch": BATCH}
    finish(config, results, report, console)
    if results[-1].value:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
