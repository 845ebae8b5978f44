"""What deciding costs a router of a thousand workers: admission and placement of one step."""

import numpy as np

from bench.common.report import Result
from router.fleet.load import Key, Warm, WorkerTable
from router.policy.admission import Admission, AdmissionConfig, Memory
from router.policy.cost import StoredRun
from router.policy.line import PLACES_MAX
from router.policy.placement import Ask, place
from tracehaul.runtime import clock
from tracehaul.wire.cluster import NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.ids import Generation, NodeId, TraceId

LIFE = Generation(1)
ROUNDS = 1000


def deciding(workers: int = 1000) -> list[Result]:
    """A full fleet with as many traces waiting as are kept in order; each round asks for one and places one."""
    limits = WorkerLimits(kv_tokens_max=860_000, local_prefill_tokens=256, stretch=5.0)
    tables: list[WorkerTable] = []
    for role, count in (("decode", workers), ("prefill", workers // 4)):
        infos = [NodeInfo(NodeId(f"{role}-{n}"), LIFE, "decode", "", limits=limits) for n in range(count)]
        loads = [NodeLoad(token_s=3e-5, pair_s=1e-9, decode_s=0.02 + n * 1e-6, pull_token_s=3e-6) for n in range(count)]
        table = WorkerTable()
        table.sync(infos, loads)
        tables.append(table)
    admission = Admission(AdmissionConfig())
    admission.resize(Memory(workers * 860_000.0, workers * 1e6))
    for number in range(20 * workers):
        admission.begins(number, 60_000, number * 1e-3, f"tenant-{number % 7}")
    for number in range(PLACES_MAX):
        admission.ask(f"w{number}", 20.0, f"tenant-{number % 7}")
    stores = [NodeId(f"store-{number}") for number in range(workers // 8)]
    runs = [StoredRun(60_000, 0.0), StoredRun(110_000, 1e-5)]
    took_ms: dict[str, list[float]] = {"admission": [], "placement": []}
    for number in range(ROUNDS):
        began_s = clock.perf_s()
        admission.ask(f"w{number}", 21.0 + number * 1e-3, f"tenant-{number % 7}")
        asked_s = clock.perf_s()
        warm = Warm(NodeId(f"decode-{number % workers}"), LIFE, 100_000)
        ask = Ask(TraceId(f"t{number}"), 113_000, runs, warm, stores[number % len(stores)])
        placement = place("cost", ask, tables[0], tables[1], stores, 1.0)
        placed_s = clock.perf_s()
        assert placement is not None
        tables[0].sent(Key(*placement.decode), placement.decode_work_s, number * 1e-3)
        took_ms["admission"].append(1e3 * (asked_s - began_s))
        took_ms["placement"].append(1e3 * (placed_s - asked_s))
    both = np.array(took_ms["admission"]) + np.array(took_ms["placement"])
    medians = {name: float(np.median(values)) for name, values in took_ms.items()}
    results = [Result(f"fleet.decide.{name}", value, "ms") for name, value in medians.items()]
    return [*results, Result("fleet.decide", float(np.median(both)), "ms")]
