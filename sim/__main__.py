"""``python -m sim --seed N`` replays one run; ``--seeds A..B`` runs many and prints how to replay what fails."""

import argparse
import logging
import sys
import traceback

import msgspec

from sim.loop import PROCESS
from sim.run import Result, simulate
from sim.shape import MIX
from tracehaul.runtime import clock


class _Lines(logging.Formatter):
    """A record with its virtual time and simulated process."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "tracehaul_fields", {})
        facts = "".join(f" {key}={value}" for key, value in fields.items())
        who = PROCESS.get() or "outside"
        return f"{clock.now_s():12.6f} {who:12} {record.levelname.lower()} {record.getMessage()}{facts}"


def main(arguments: list[str]) -> int:
    """Exit code: 0 if nothing was violated."""
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="run this one")
    which.add_argument("--seeds", help="run A..B, both included")
    parser.add_argument("--traces", type=int, default=MIX.traces, help="agent traces in each run")
    parser.add_argument("--verbose", action="store_true", help="print faults, counters and every log line")
    options = parser.parse_args(arguments)
    if options.seeds is None:
        seeds = [options.seed]
    else:
        first, _, last = options.seeds.partition("..")
        seeds = list(range(int(first), int(last) + 1))
    if options.verbose:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_Lines())
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    else:
        logging.basicConfig(level=logging.ERROR, handlers=[logging.NullHandler()])  # the checkers listen
    failed = sum(not _run(seed, options.traces, options.verbose) for seed in seeds)
    _say(f"{len(seeds) - failed} of {len(seeds)} seeds passed")
    return 1 if failed else 0


def replay(seed: int, traces: int) -> str:
    """The command that repeats a run."""
    return f"python -m sim --seed {seed} --traces {traces} --verbose"


def _run(seed: int, traces: int, verbose: bool) -> bool:
    try:
        result = simulate(seed, mix=msgspec.structs.replace(MIX, traces=traces))
    except Exception:
        traceback.print_exc()
        _say(f"seed {seed} broke off; replay: {replay(seed, traces)}")
        return False
    if verbose:
        _describe(result)
    for finding in result.findings:
        _say(f"seed {seed}: {finding}")
    if result.findings:
        _say(f"seed {seed} failed; replay: {replay(seed, traces)}")
    return not result.findings


def _describe(result: Result) -> None:
    for fault in result.faults:
        _say(f"{fault}")
    for name, count in sorted(result.counts.items()):
        if count:
            _say(f"{name} {count}")
    _say(
        f"seed {result.seed}: {result.finished} steps finished, {result.failed} attempts failed, "
        f"{result.hung_up} hung up, {result.cached_tokens} of {result.prompt_tokens} prompt tokens cached, "
        f"{result.virtual_s:.1f} virtual seconds, digest {result.digest}"
    )


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command's output


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
