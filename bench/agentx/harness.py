"""The AgentX harness as a process: what it is told, what it says meanwhile, what it found."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.agentx.recordings import smaller
from bench.common.recordings import documents
from tracehaul.model.source import resolve
from tracehaul.model.text import Text

VERSION = "1.0.12"
"""That scripts/peers installs."""
TOKENIZER = "bench/served"
"""The served model's tokenizer by a name of the hub's, in a cache of the bench's own."""
MEASURES = "Phase profiling "
"""How the lines begin that say when what is measured begins and ends."""
STATS_S = 10
GRACE_S = 20
END_S = 20.0
LINE_MAX = 1 << 20
SETUP_S = 1800.0
"""From the harness's start to its end, beside the time that it measures."""


class Load(msgspec.Struct, frozen=True):
    """What the harness does."""

    agents: int
    duration_s: int
    """Of what is measured."""
    warmup: int
    """Requests of each agent before it."""
    context_max: int
    """Traces with a longer one are left out."""
    gap_max_s: float
    """A trace's longest pause."""


class Found(NamedTuple):
    """By one run."""

    steps: int
    """That were answered."""
    errors: int
    seconds: float
    ttft_s: list[float]
    prompt_tokens: int
    computed_tokens: int
    """Those of prompts that were not found in a cache."""


class HarnessError(Exception):
    """It failed: the end of what it said."""


def words_of(agentx: Path, url: str, recordings: Path, out: Path, load: Load) -> list[str]:
    """The harness's command."""
    options: dict[str, object] = {
        "url": url,
        "endpoint": "/v1/chat/completions",
        "model": resolve().name,
        "tokenizer": TOKENIZER,
        "input-file": recordings,
        "custom-dataset-type": "weka-trace",
        "concurrency": load.agents,
        "benchmark-duration": load.duration_s,
        "benchmark-grace-period": GRACE_S,
        "warmup-requests-per-lane": load.warmup,
        "max-context-length": load.context_max,
        "trace-idle-gap-cap-seconds": load.gap_max_s,
        "stats-interval": STATS_S,
        "ui": "none",
        "output-artifact-dir": out,
    }
    told = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [str(agentx), "profile", "--scenario", "agentx", *told, "--unsafe-override"]


def environment_of(hub: Path) -> dict[str, str]:
    """The harness's: nothing is fetched, and a subagent's parent is told."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **own,
        "HF_HOME": str(hub),
        "HF_HUB_OFFLINE": "1",
        "AIPERF_HTTP_X_DYNAMO_SESSION_ID_FROM_CORRELATION_ID": "true",
    }


async def run(
    words: list[str], environment: dict[str, str], out: Path, limit_s: float, tell: Callable[[str], None]
) -> Found:
    """What one run of it found; ``tell`` is given a line of progress now and then.

    Raises:
        HarnessError: it failed, or did not end within ``limit_s``.
    """
    process = await asyncio.create_subprocess_exec(
        *words,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        limit=LINE_MAX,
    )
    last: list[str] = []
    try:
        async with asyncio.timeout(limit_s):
            assert process.stdout is not None
            async for line in process.stdout:
                said = line.decode(errors="replace").rstrip()
                last = [*last[-40:], said]
                if (shown := progress(said)) is not None:
                    tell(shown)
            code = await process.wait()
    except TimeoutError:
        raise HarnessError("\n".join([*last, f"it has not ended within {limit_s:.0f} s"])) from None
    finally:
        await _end(process)
    if code:
        raise HarnessError("\n".join([*last, f"it ended with {code}"]))
    try:
        records = (out / "profile_export.jsonl").read_text().splitlines()
        found = found_of(records, json.loads((out / "profile_export_aiperf.json").read_bytes()))
    except (OSError, ValueError, KeyError) as error:
        raise HarnessError("\n".join([*last, f"what it wrote cannot be read: {error!r}"])) from error
    if not found.steps:
        raise HarnessError("\n".join([*last, "not one step was answered"]))
    return found


async def _end(process: asyncio.subprocess.Process) -> None:
    """With all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_S)


def progress(line: str) -> str | None:
    """What of a line of the harness's is worth showing."""
    for mark in ("rps=", "ttft ", "Dataset configured", "Phase warmup", MEASURES):
        at = line.find(mark)
        if at >= 0:
            return line[at:].rpartition(" (")[0] or line[at:]
    return None


def found_of(records: Iterable[str], summary: dict[str, Any]) -> Found:
    """Of the lines of its records, and its summary.

    Raises:
        KeyError, ValueError: they have another form.
    """
    ttft_s: list[float] = []
    errors, prompt, cached = 0, 0, 0
    for line in records:
        record = json.loads(line)
        if record["metadata"]["benchmark_phase"] != "profiling":
            continue
        if record.get("error") is not None:
            errors += 1
            continue
        metrics = record["metrics"]
        ttft_s.append(metrics["time_to_first_token"]["value"] / 1e3)
        prompt += metrics["usage_prompt_tokens"]["value"]
        cached += metrics["usage_prompt_cache_read_tokens"]["value"]
    return Found(len(ttft_s), errors, summary["benchmark_duration"]["avg"], ttft_s, prompt, prompt - cached)


def make_recordings(source: Path, folder: Path, by: int, sooner: float) -> int:
    """Write traces, made smaller, where the harness reads them; how many.

    Raises:
        FileNotFoundError, ValueError: there are none.
    """
    folder.mkdir()
    count = 0
    for name, data in documents(source):
        trace = json.loads(data)
        if not isinstance(trace, dict) or "hash_id_scope" not in trace:
            raise ValueError(f"{name} in {source} is no trace of the kv-cache-tester's form")
        (folder / name).write_text(json.dumps(smaller(trace, by, sooner)))
        count += 1
    if not count:
        raise ValueError(f"{source} holds no traces")
    return count


def make_hub(folder: Path) -> None:
    """A cache of the hub's form that holds the served model's tokenizer, as :data:`TOKENIZER`."""
    model = folder / "hub" / f"models--{TOKENIZER.replace('/', '--')}"
    files = model / "snapshots" / "local"
    files.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("local")
    text = Text.load(resolve())
    says = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": text.chat_template}
    (files / "tokenizer.json").write_text(text.serialized())
    (files / "tokenizer_config.json").write_text(json.dumps(says))
    (files / "config.json").write_text(json.dumps({"model_type": "llama"}))
