"""``tracehaul bench replay``."""

import asyncio
import lzma
import tarfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from bench.common.recordings import documents, find
from bench.common.report import finish
from bench.replay.choose import Forks, Limits, choose, forks
from bench.replay.endpoint import Affinity, NoEndpoint, Prompts
from bench.replay.parse import parse
from bench.replay.progress import shown
from bench.replay.recording import Trace
from bench.replay.records import summary
from bench.replay.run import Outcome, Target, replay
from bench.replay.schedule import Pacing
from cluster.rundir import ClusterFault

RECORDINGS_VARIABLE = "TRACEHAUL_RECORDINGS"


def read_traces(recordings: Path, workload: str | None) -> list[Trace]:
    """The traces of one workload; ClusterFault says in one line what is wrong with it."""
    try:
        return parse(documents(find(recordings, workload)))
    except (OSError, ValueError, tarfile.TarError, lzma.LZMAError) as error:
        raise ClusterFault(f"cannot read the recordings in {recordings}: {error}") from error


def replay_command(
    url: Annotated[str, typer.Option(help="Base URL of any server of OpenAI's form.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server names.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="If the server wants one.")] = None,
    recordings: Annotated[
        Path | None,
        typer.Option(envvar=RECORDINGS_VARIABLE, help="A folder or archive of weka, mooncake or mini-swe recordings."),
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="Which archive or folder in it, by the beginning of its name.")
    ] = None,
    fork: Annotated[
        int | None, typer.Option(min=1, help="No recording: parents of 4k tokens that fork into that many children.")
    ] = None,
    traces: Annotated[int, typer.Option(min=1, help="At most so many traces.")] = 24,
    concurrency: Annotated[int, typer.Option(min=1, help="Traces at once.")] = 8,
    stagger: Annotated[float, typer.Option(min=0, help="Seconds between the starts of the first traces.")] = 0.5,
    time_scale: Annotated[float, typer.Option(min=1e-3, help="Gaps and start times are divided by it.")] = 1.0,
    gap_max: Annotated[float, typer.Option(min=0, help="Longest gap in seconds, after scaling.")] = 60.0,
    skip_steps: Annotated[int, typer.Option(min=0, help="Leave out each trace's first steps.")] = 0,
    min_steps: Annotated[int, typer.Option(min=1, help="Leave out traces with fewer steps.")] = 1,
    max_steps: Annotated[int, typer.Option(min=1, help="At most so many steps per trace.")] = 12,
    min_context: Annotated[int, typer.Option(min=0, help="Leave out traces whose longest prompt is shorter.")] = 0,
    max_context: Annotated[int, typer.Option(min=1, help="Cut traces before a longer context, in tokens.")] = 8000,
    max_output: Annotated[int, typer.Option(min=1, help="At most so many output tokens per step.")] = 128,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Prompt tokens of all traces.")] = None,
    subagents: Annotated[bool, typer.Option(help="Only traces that start subagents.")] = False,
    common_prefix: Annotated[
        bool, typer.Option(help="Tools and system prompt are the same tokens in all traces.")
    ] = False,
    prompts: Annotated[
        Prompts | None, typer.Option(help="How prompts are sent. Default: token ids where the server takes them.")
    ] = None,
    affinity: Annotated[
        Affinity, typer.Option(help="What the session headers name: each trace, or the one that started it all.")
    ] = "trace",
    block: Annotated[int, typer.Option(min=1, help="Block size of the server's cache, for the bound of hits.")] = 32,
    seed: Annotated[int, typer.Option(help="Which traces, in which order.")] = 1,
    salt: Annotated[str, typer.Option(help="Changes every token and trace id: no hits from an earlier run.")] = "",
    timeout: Annotated[float, typer.Option(min=1, help="Longest time of one step in seconds.")] = 600.0,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    raw: Annotated[Path | None, typer.Option(help="Write every step there, a line of JSON each.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the replay there (needs tracehaul[bench]).")] = None,
) -> None:
    """Send recorded agent work to a server at its own pace, and say how the server did.

    A trace's next step is sent when the recorded gap has passed since the one before ended; what a subagent does
    runs beside its siblings, and the trace waits for it. Prompts come from the recording, not from what the model
    answers, so every server gets the same ones. Token ids are made of the names in the recording.

    Examples:

      tracehaul bench replay --recordings ./recordings --workload weka --time-scale 8 --gap-max 8

      tracehaul bench replay --url http://127.0.0.1:8100 --fork 8 --traces 2 --concurrency 1
    """
    limits = Limits(
        traces_max=traces,
        skip_steps=skip_steps,
        steps_min=min_steps,
        steps_max=max_steps,
        context_min=min_context,
        context_max=max_context,
        output_max=max_output,
        prompt_tokens_max=token_budget,
        subagents_only=subagents,
        common_prefix=common_prefix,
    )
    if fork is not None:
        chosen = forks(Forks(children=fork, parents=traces), seed)
    elif recordings is not None:
        chosen = choose(read_traces(recordings, workload), limits, seed)
    else:
        raise ClusterFault(f"say where recordings are: --recordings, or the variable {RECORDINGS_VARIABLE}")
    if not chosen:
        raise ClusterFault("no trace of the recording is within these limits")
    pacing = Pacing(concurrency=concurrency, time_scale=time_scale, gap_max_s=gap_max, stagger_s=stagger)
    target = Target(url, model, prompts, salt, affinity, timeout, api_key, block)
    console = Console()
    with shown(console) as observe:
        try:
            outcome = asyncio.run(replay(chosen, pacing, target, observe))
        except NoEndpoint as error:
            raise ClusterFault(str(error)) from error
    config: dict[str, Any] = {
        "target": msgspec.to_builtins(msgspec.structs.replace(target, api_key=None)),
        "form": msgspec.to_builtins(outcome.form),
        "pacing": msgspec.to_builtins(pacing),
        "limits": msgspec.to_builtins(limits),
        "fork": fork,
        "workload": workload or (recordings.name if recordings is not None else None),
        "seed": seed,
        "traces": len(chosen),
        "prompt_tokens": sum(trace.prompt_tokens for trace in chosen),
        "wall_s": outcome.wall_s,
    }
    _tell(outcome, config, console, json, raw, png)


def _tell(
    outcome: Outcome, config: dict[str, Any], console: Console, json: Path | None, raw: Path | None, png: Path | None
) -> None:
    records = outcome.records
    finish(config, summary(records, outcome.completed, outcome.wall_s, outcome.hits), json, console)
    for kind in dict.fromkeys(record.error for record in records if record.error is not None):
        example = next(record for record in records if record.error == kind)
        console.print(f"{kind}, for example: {example.trace} step {example.index}: {example.detail}", markup=False)
    if raw is not None:
        raw.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
        console.print(f"written to {raw}")
    if png is not None:
        try:
            from bench.replay.plot import plot
        except ImportError as error:
            raise ClusterFault("a picture needs matplotlib: install tracehaul[bench]") from error
        title = f"{config['traces']} traces, {len(records)} steps, {config['target']['url']}"
        plot(records, outcome.hits, title, png)
        console.print(f"drawn to {png}")
