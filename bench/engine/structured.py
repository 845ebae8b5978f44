"""Does every answer that ends match its schema? Random schemas, and jsonschema as the judge.

Most answers are sampled from random logits over the default model's vocabulary, which try more than a model would and
end sooner; some by the model itself.
"""

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from bench.common.report import Result, finish
from bench.engine.schemas import random_schema
from tracehaul.engine.base import Engine, Work
from tracehaul.engine.grammar import Grammars, vocabulary
from tracehaul.engine.sampling import Row, choose, follow
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.model.source import DEFAULT_MODEL, resolve
from tracehaul.model.text import Text
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import Constraint, Sampling

BATCH = 16
QUICK_SHARE = 10
OUTPUT_TOKENS = 128
PROMPT_CHARACTERS = 400
KV_TOKENS = 16_384
CLOSING = ('"', "}", "]", '"}', "]}")
LEAN = 5.0
"""Added to the logits of what closes: otherwise hardly a random answer would end."""

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


class Scribbler:
    """Answers from random logits: everything but the model is what serves."""

    def __init__(self, text: Text, seed: int) -> None:
        self._text = text
        self._grammars = Grammars(lambda: vocabulary(text.serialized(), text.eos_tokens, text.vocab_size))
        self._source = np.random.default_rng(seed)
        self._lean: NDArray[np.float32] = np.zeros(text.vocab_size, dtype=np.float32)
        closing = [token for end in CLOSING for token in text.encode(end)]
        self._lean[[*closing, *text.eos_tokens]] = LEAN

    async def answer(self, schema: dict[str, Any]) -> str | None:
        """One answer; None if it does not end within the limit.

        Raises:
            InvalidRequest: the schema cannot be used.
        """
        guide = await self._grammars.guide(Constraint("json_schema", json.dumps(schema)), [])
        sampling = Sampling(OUTPUT_TOKENS, seed=int(self._source.integers(2**32)))
        output: list[int] = []
        while len(output) < OUTPUT_TOKENS:
            logits = self._source.standard_normal(len(self._lean), dtype=np.float32) + self._lean
            row = Row(sampling, len(output), len(output), None, guide.mask())
            (result,) = follow(choose(logits[None], [row]), [guide])
            if result.token is None:
                raise InvalidRequest(result.error)
            if result.token in self._text.eos_tokens:
                return self._text.raw(output)
            output.append(result.token)
        return None

    def close(self) -> None:
        """End its threads."""
        self._grammars.close()


def valid(schema: dict[str, Any], answer: str) -> bool:
    """Whether an answer is JSON that matches its schema, formats included."""
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).is_valid(value)


async def scribbled(count: int, seed: int, progress: Progress) -> list[Result]:
    """Answers from random logits to ``count`` schemas: how many ended, and how many of those are wrong."""
    source = random.Random(seed)
    scribbler = Scribbler(Text.load(resolve()), seed)
    bar = progress.add_task("random logits", total=count)
    ended = wrong = 0
    for _ in range(count):
        schema = random_schema(source)
        answer = await scribbler.answer(schema)
        ended += answer is not None
        if answer is not None and not valid(schema, answer):
            wrong += 1
            console.print(f"wrong: {json.dumps(schema)}\n{answer}", markup=False)
        progress.advance(bar)
    scribbler.close()
    return [
        Result("structured.random.ended", ended, f"of {count} answers"),
        Result("structured.random.wrong", wrong, f"of {ended} that ended"),
    ]


async def answered(count: int, seed: int, progress: Progress) -> list[Result]:
    """The same by the model."""
    source = random.Random(seed)
    text = Text.load(resolve())
    engine = await TorchEngine.load(TorchEngineConfig(kv_tokens_max=KV_TOKENS))
    bar = progress.add_task("the model", total=count)
    ended = wrong = 0
    try:
        for start in range(0, count, BATCH):
            batch = [random_schema(source) for _ in range(min(BATCH, count - start))]
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
        Result("structured.model.ended", ended, f"of {count} answers"),
        Result("structured.model.wrong", wrong, f"of {ended} that ended"),
    ]


def main(
    schemas: Annotated[int, typer.Option(help="Answered from random logits.")] = 1000,
    by_model: Annotated[int, typer.Option(help="Answered by the model.")] = 96,
    seed: Annotated[int, typer.Option(help="Of the schemas and of sampling.")] = 1,
    report: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    quick: Annotated[bool, typer.Option(help="A tenth of the answers.")] = False,
) -> None:
    """Answer random schemas, and check every answer that ends."""
    if quick:
        schemas, by_model = schemas // QUICK_SHARE, by_model // QUICK_SHARE

    async def run() -> list[Result]:
        with Progress(console=console) as progress:
            results = await scribbled(schemas, seed, progress)
            return results + await answered(by_model, seed, progress) if by_model else results

    results = asyncio.run(run())
    config = {
        "model": DEFAULT_MODEL,
        "schemas": schemas,
        "by_model": by_model,
        "seed": seed,
        "output_tokens": OUTPUT_TOKENS,
        "batch": BATCH,
        "quick": quick,
    }
    finish(config, results, report, console)
    if any(result.value for result in results if result.name.endswith(".wrong")):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
