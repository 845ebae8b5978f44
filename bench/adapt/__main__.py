"""``python -m bench.adapt``: the loop that adapts a fleet, on a simulated one and on a live one."""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.adapt import live
from bench.adapt.knobs import LOADS, RANGES, Setting, sweep, worth
from bench.adapt.phases import SPLITS, run
from bench.common.report import Result, finish
from router.adapt.loop import AdaptConfig

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode="rich", help=__doc__)
STARTS_WITH = 4


@app.callback()
def adapt() -> None:
    """The loop that adapts a fleet, on a simulated one and on a live one."""


@app.command("phases")
def phases_command(
    load: Annotated[float, typer.Option(min=0.1, help="Agents, as a multiple of what keeps the fleet busy.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Which traces.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    """Three shifts of the mix on eight simulated accelerators: ours, and every split that is left alone."""
    fixed = {prefills: run(prefills, load, seed) for prefills in SPLITS}
    ours = run(STARTS_WITH, load, seed, AdaptConfig(enabled=True))
    found: list[Result] = []
    for mix, value in ours.phases.items():
        best = max(fixed, key=lambda prefills: fixed[prefills].phases[mix])
        versus = f"adapt.sim.{mix}.{best}p"
        found.append(Result(versus, fixed[best].phases[mix], "1/s"))
        found.append(Result(f"adapt.sim.{mix}", value, "1/s", versus, value / fixed[best].phases[mix]))
    for prefills, one in fixed.items():
        found.append(Result(f"adapt.sim.whole.{prefills}p", one.whole, "1/s"))
    best = max(fixed, key=lambda prefills: fixed[prefills].whole)
    ratio = ours.whole / fixed[best].whole
    found.append(Result("adapt.sim.whole", ours.whole, "1/s", f"adapt.sim.whole.{best}p", ratio))
    finish({"load": load, "seed": seed}, found, json, Console())


@app.command("knobs")
def knobs_command(
    prefills: Annotated[int, typer.Option(min=1, max=7, help="Of eight workers.")] = 2,
    seed: Annotated[int, typer.Option(help="Which traces.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    """What each knob is worth: steps in time per second with every fixed setting of it, on eight simulated workers."""
    points = list(sweep(Setting(prefills=prefills), list(RANGES), LOADS, seed))
    found = [Result(f"adapt.knob.{p.knob}.{p.mix}.{p.load:g}x.{p.value}", p.steps_s, "1/s") for p in points]
    found += [Result(f"adapt.knob.{knob}.worth", value, "1") for knob, value in worth(points).items()]
    finish({"prefills": prefills, "seed": seed}, found, json, Console())


@app.command("live")
def live_command(
    seconds: Annotated[float, typer.Option(min=4, help="Of each phase.")] = 60.0,
    splits: Annotated[str, typer.Option(help="Prefill workers of four, of the fleets that are left alone.")] = "1,2,3",
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    """Three shifts of the mix on four live workers of fake engines: ours, and every split that is left alone.

    ``adapt.ratio``: ours over the best of these in each phase, from 30 s after its begin: the worst phase.
    ``adapt.whole``: over the whole run, over the best single one. ``adapt.failed``: calls that were not answered.
    ``adapt.flip.hits``: the share of contexts that was not computed again, after changes of roles over before.
    """

    def run(prefills: int, config: AdaptConfig) -> live.Outcome:
        with tempfile.TemporaryDirectory() as folder:
            outcome = asyncio.run(live.measure(Path(folder), prefills, config, seconds))
        shown = ", ".join(f"{name} {value:.2f}" for name, value in outcome.phases.items())
        note = Console(stderr=True)
        note.print(f"begun with {prefills}p: {shown}; {' '.join(outcome.seen.splits)}", markup=False)
        for line in outcome.seen.failed[:3]:
            note.print(line, markup=False)
        return outcome

    ours = run(live.BEGUN_WITH, live.ADAPT)
    fixed = {int(each): run(int(each), AdaptConfig()) for each in splits.split(",")}
    finish({"seconds": seconds, "begun_with": live.BEGUN_WITH}, live.results(fixed, ours), json, Console())


if __name__ == "__main__":
    app()
