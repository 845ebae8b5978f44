"""What the engine's side of the store costs, beside the store's own client on the same node, in turns.

``put`` and ``get`` are whole calls of 94 MB in blocks of the default model. ``later`` is what a step of the engine
waits while its blocks are taken for a put in the background; then with the store frozen.
"""

import signal
from statistics import median

from rich.progress import Progress

from bench.common.processes import Place, Process, running, together
from bench.common.report import Result
from bench.engines.cost_process import BLOCK_BYTES, BLOCKS
from bench.engines.stock import CHECKOUT, Engine
from bench.store.process import BATCH_BYTES

MODULE = "bench.engines.cost_process"
ARENA_BYTES = 1 << 30
ROUNDS = 15
WARM_UP_ROUNDS = 3
HERE = Place("127.0.0.1", environment={"PYTHONPATH": str(CHECKOUT)})


def cost(engine: Engine, quick: bool) -> list[Result]:
    """``engines.ENGINE.put`` and ``.get``: seconds for the same bytes, divided by the store's own client's."""
    rounds = ROUNDS // 3 if quick else ROUNDS
    node = Process(HERE, "node", str(ARENA_BYTES), module=MODULE)
    with running(node), Progress() as progress:
        there = node.hear()
        side = Process(HERE, "engine", engine.name, there["router"], module=MODULE, python=str(engine.python))
        client = Process(HERE, "client", "shm", HERE.host, "client-0")
        with running(side, client):
            side.hear()
            client.hear()
            client.ask(do="attach", info=there["info"], size=BLOCK_BYTES)
            seconds: dict[str, list[float]] = {}
            cpu: dict[str, list[float]] = {}
            task = progress.add_task("put and get", total=rounds)
            for batch in range(-WARM_UP_ROUNDS, rounds):
                turn: dict[str, float] = {}
                spent: dict[str, float] = {}
                for what, who in (("put", side), ("get", side), ("client.put", client), ("client.get", client)):
                    at = batch + 10 - (2 if what.endswith("get") and batch > 2 - WARM_UP_ROUNDS else 0)
                    before_s = who.ask(do="cpu")
                    turn[what] = together([who], do=what.rpartition(".")[2], batch=at)
                    spent[what] = who.ask(do="cpu") - before_s
                turn["later"] = together([side], do="later", batch=10_000 + batch)
                side.ask(do="over")  # what goes on in the background is not the next put's
                if batch >= 0:
                    progress.advance(task)
                    for what, took_s in turn.items():
                        seconds.setdefault(what, []).append(took_s)
                    for what, spent_s in spent.items():
                        cpu.setdefault(what, []).append(spent_s)
            node.send(signal.SIGSTOP)
            frozen_s = together([side], do="later", batch=20_000)
            node.send(signal.SIGCONT)
    medians = [{what: median(values) for what, values in kind.items()} for kind in (seconds, cpu)]
    return _results(engine.name, medians[0], medians[1], frozen_s)


def _results(engine: str, seconds: dict[str, float], cpu: dict[str, float], frozen_s: float) -> list[Result]:
    name = f"engines.{engine}"
    results: list[Result] = []
    theirs, ours = BATCH_BYTES // BLOCK_BYTES * BLOCK_BYTES / 1e9, BLOCKS * BLOCK_BYTES / 1e9
    for way in ("put", "get"):
        own, engines = theirs / seconds[f"client.{way}"], ours / seconds[way]
        results.append(Result(f"{name}.client.{way}", own, "GB/s"))
        results.append(Result(f"{name}.{way}", own / engines, "1", f"{name}.client.{way}", own / engines))
        results.append(Result(f"{name}.{way}.rate", engines, "GB/s", f"{name}.client.{way}", engines / own))
        own, engines = cpu[f"client.{way}"] / theirs, cpu[way] / ours
        results.append(Result(f"{name}.client.{way}.cpu", own, "s/GB"))
        results.append(Result(f"{name}.{way}.cpu", engines, "s/GB", f"{name}.client.{way}.cpu", engines / own))
    later = f"{name}.later"
    results.append(Result(later, seconds["later"] * 1e3, "ms"))
    results.append(Result(f"{later}.frozen", frozen_s * 1e3, "ms", later, frozen_s / seconds["later"]))
    return results
