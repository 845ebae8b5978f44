"""``python -m bench.adapt``: the loop that adapts a fleet, on a simulated one."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.adapt.knobs import LOADS, RANGES, Setting, sweep, worth
from bench.adapt.phases import SPLITS, run
from bench.common.report import Result, finish
from router.adapt.loop import AdaptConfig

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode="rich", help=__doc__)
STARTS_WITH = 4


@app.callback()
def adapt() -> None:
    """The loop that adapts a fleet, on a simulated one."""


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


if __name__ == "__main__":
    app()
