"""``ablation.*``: what each mechanism of retention gives, by what is lost without it.

Recorded agents, every length divided by four, in the simulator: the router's and the workers' own code under virtual
time, so that nothing but the mechanism differs between two runs. Costs are in about the proportion that a long context
has on a GPU: computing it takes thirty times as long as copying it from a store's memory. The workers hold a quarter of
the contexts, the stores a half in memory and all on disk. ``ablation.step_s`` is how long a step takes with everything,
the first of each trace left out, mean over all runs; ``ablation.step_s.without_pins`` without ``pins``;
``ablation.step.pins`` the first divided by the second: below 1 it helps. ``ablation.runs.pins`` is the share of runs in
which it did, those in which it made no difference left out.
"""

import logging
from collections.abc import Sequence
from multiprocessing import get_context
from statistics import mean
from typing import Any

import msgspec
from rich.console import Console

from bench.common.report import Result
from bench.replay.choose import Limits, choose
from bench.replay.recording import Trace
from kvstore.tiers.tiering import TieringConfig
from router.dispatch.config import DispatchConfig
from router.policy.retention import RetentionConfig
from router.traces.decisions import Ended
from sim.faults import FaultPlan
from sim.run import simulate
from sim.shape import ROUTER
from sim.storage import Below
from sim.text import VOCAB
from sim.traces import StepPlan, TracePlan
from sim.world import World
from tracehaul.engine.fake import EngineCost, fake_info
from tracehaul.wire.ids import TraceId
from tracehaul.wire.steps import Sampling
from worker.config import WorkerConfig

RUNS, QUICK_RUNS = 8, 2
LIMITS = Limits(traces_max=16, skip_steps=4, steps_min=8, steps_max=8, context_min=3500, output_max=64)
DIVISOR = 4
GAP_MAX_S = 20.0
STAGGER_S = 1.0
CONTEXT_MAX = 2100
WORKER_SHARE, STORE_SHARE = 4, 2
WORKERS, STORES = 2, 3
BLOCK_TOKENS, SLOT_BYTES = 8, 4096
COST = EngineCost(iteration_s=0.02, prefill_token_s=3e-3, copy_token_s=1e-4)
DISK_S = 0.5
"""A call of the disk takes up to this long, half of it in the mean."""
CALM = FaultPlan(faults=(), end_s=1.0, frame_delay_s=0.0005, copy_delay_s=0.0005)
VARIANTS = {
    "all": RetentionConfig(),
    "pins": RetentionConfig(pins=False),
    "recall": RetentionConfig(recall=False),
}


def ablation_results(traces: Sequence[Trace], config: dict[str, Any], console: Console, *, quick: bool) -> list[Result]:
    """All variants on the same agents, some others in each run."""
    runs = QUICK_RUNS if quick else RUNS
    config["ablation"] = {"runs": runs, "limits": msgspec.to_builtins(LIMITS), "divisor": DIVISOR}
    config["ablation"] |= {"cost": msgspec.to_builtins(COST), "disk_s": DISK_S, "gap_max_s": GAP_MAX_S}
    step_s: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a simulated cluster leaves much memory behind
        for run in range(runs):
            plans = [_plan(trace, at) for at, trace in enumerate(choose(traces, LIMITS, seed=run))]
            for name in VARIANTS:
                step_s[name].append(pool.apply(_run, (run, plans, name)))
            told = ", ".join(f"{name} {of[-1]:.3f}" for name, of in step_s.items())
            console.print(f"run {run + 1} of {runs}, seconds a step without: {told}", highlight=False)
    everything = step_s.pop("all")
    results = [Result("ablation.step_s", mean(everything), "s")]
    for name, without in step_s.items():
        other, ratio = f"ablation.step_s.without_{name}", mean(everything) / mean(without)
        results += [Result(other, mean(without), "s"), Result(f"ablation.step.{name}", ratio, "1", other, ratio)]
        differ = [a < b for a, b in zip(everything, without, strict=True) if a != b]
        if differ:
            results.append(Result(f"ablation.runs.{name}", mean(differ), "1"))
    return results


def _plan(trace: Trace, at: int) -> TracePlan:
    """The same lengths and gaps, of tokens that no other trace has."""
    steps: list[StepPlan] = []
    length = 0
    for number, step in enumerate(trace.steps):
        new = max(1, step.prompt.tokens // DIVISOR - length)
        output = max(1, step.output_tokens // DIVISOR)
        tokens = tuple((at * 31 + (length + n) * (at + 7)) % VOCAB for n in range(new))
        sampling = Sampling(max_tokens=output, temperature=0.0)
        steps.append(StepPlan(tokens, min(step.gap_s, GAP_MAX_S) if number else 0.0, sampling))
        length += new + output
    return TracePlan(TraceId(f"agent-{at}"), "", at * STAGGER_S, None, 0, tuple(steps))


def _run(seed: int, plans: Sequence[TracePlan], variant: str) -> float:
    """Mean seconds of a step."""
    logging.basicConfig(level=logging.ERROR, handlers=[logging.NullHandler()])
    need = sum(sum(len(step.new_tokens) + step.sampling.max_tokens for step in plan.steps) for plan in plans)
    worlds: list[World] = []

    def prepare(world: World) -> None:
        slots = need // BLOCK_TOKENS
        tiering = TieringConfig(scrub_bytes_s=0)
        world.shape = msgspec.structs.replace(
            world.shape,
            engine=fake_info(
                context_max=CONTEXT_MAX,
                kv_tokens_max=max(CONTEXT_MAX + 100, need // WORKER_SHARE // WORKERS),
                vocab_size=VOCAB,
            ),
            cost=COST,
            store=msgspec.structs.replace(
                world.shape.store,
                arena_bytes=slots // STORE_SHARE // STORES * SLOT_BYTES,
                quota_bytes={},
                lease_ttl_max_s=6.0,
                reservation_ttl_s=5.0,
            ),
            worker=WorkerConfig(local_prefill_tokens=256 // DIVISOR, group_blocks=8),
            dispatch=DispatchConfig(retention=VARIANTS[variant]),
            below=Below(2 * slots, DISK_S, tiering, pin_share=0.0, prefetch_share=0.0, quotas=False),
        )
        worlds.append(world)

    result = simulate(seed, plan=CALM, prepare=prepare, traces=plans)
    assert result.failed == 0, result.findings
    dispatch = worlds[0].lives[ROUTER].dispatch
    assert dispatch is not None
    step_s: list[float] = []
    for trace in dispatch.traces.all():
        ended = [entry.decision for entry in trace.decisions if isinstance(entry.decision, Ended)]
        step_s += [one.seconds for one in ended[1:]]
    return mean(step_s)
