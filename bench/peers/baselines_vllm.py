"""What vLLM does with the same weights, cores and requests: driven in its own process, without HTTP.

Run as a program by an interpreter that has vLLM, which need not be ours: it imports nothing of this project but the
connector beside it. Told and answering in JSON lines like the other processes of the bench, in the words of
``bench.engine.process``.
"""

import json
import os
import sys
import time  # noqa: TID251 - a program of its own, which does not run this project
from collections.abc import Iterable
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

TOKEN = 17
"""What contexts are made of: speed does not depend on sense."""


class VLLM:
    """One engine."""

    def __init__(self, model: str, kv_tokens: int, token_bytes: int, *, compiled: bool) -> None:
        vllm: Any = import_module("vllm")
        self._params: Any = vllm.SamplingParams
        self._as_they_come: Any = import_module("vllm.sampling_params").RequestOutputKind.DELTA
        transfer = {
            "kv_connector": "Held",
            "kv_connector_module_path": "bench.peers.baselines_vllm_held",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"startup_fill": True},
        }
        self._engine: Any = vllm.LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=8192,
            kv_cache_memory_bytes=kv_tokens * token_bytes,
            enable_prefix_caching=False,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            block_size=32,
            enforce_eager=not compiled,
            kv_transfer_config=transfer,
            disable_log_stats=True,
        ).llm_engine
        self._names = count()

    def _add(self, tokens: list[int], outputs: int, held: int = 0) -> str:
        """A request of which ``held`` tokens count as computed."""
        name = str(next(self._names))
        extra = {"kv_transfer_params": {"held": held}} if held else None
        params = self._params(
            max_tokens=outputs,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
            output_kind=self._as_they_come,
        )
        self._engine.add_request(name, {"prompt_token_ids": tokens}, params)
        return name

    def _step(self) -> Iterable[tuple[str, list[int]]]:
        """One iteration: new tokens by request."""
        for output in self._engine.step():
            yield output.request_id, list(output.outputs[0].token_ids)

    def prefill(self, tokens: list[int], held: int) -> dict[str, Any]:
        """Seconds until the token after a prompt, whose first ``held`` tokens are there."""
        began_s = time.perf_counter()
        self._add([TOKEN] * held + tokens, 1, held)
        while not any(new for _, new in self._step()):
            pass
        took_s = time.perf_counter() - began_s
        self._drain()
        return {"seconds": took_s}

    def decode(self, contexts: list[int], iterations: int, warm_up: int) -> dict[str, Any]:
        """Seconds of that many iterations over sequences of these lengths."""
        for held in contexts:
            self._add([TOKEN] * (held + 1), iterations + warm_up + 1, held)
        seen = 0
        while seen < len(contexts) * warm_up:
            seen += sum(len(new) for _, new in self._step())
        assert seen == len(contexts) * warm_up, "the batch is not in step"
        began_s = time.perf_counter()
        for _ in range(iterations):
            seen += sum(len(new) for _, new in self._step())
        took_s = time.perf_counter() - began_s
        assert seen == len(contexts) * (warm_up + iterations), "the batch is not in step"
        self._drain()
        return {"seconds": took_s}

    def serve(self, requests: list[tuple[float, list[int], int]]) -> dict[str, Any]:
        """Seconds from the first arrival to the last token of requests ``(arrival, prompt, outputs)``."""
        waiting, left = list(reversed(requests)), len(requests)
        owed: dict[str, int] = {}
        began_s = time.perf_counter()
        while left:
            now_s = time.perf_counter() - began_s
            while waiting and waiting[-1][0] <= now_s:
                _, prompt, outputs = waiting.pop()
                owed[self._add(prompt, outputs)] = outputs
            if not owed:
                time.sleep(max(0.0, waiting[-1][0] - now_s))
                continue
            for name, new in self._step():
                owed[name] -= len(new)
                if owed[name] == 0:
                    del owed[name]
                    left -= 1
        return {"seconds": time.perf_counter() - began_s}

    def greedy(self, tokens: list[int], outputs: int) -> dict[str, Any]:
        """What follows a prompt."""
        self._add(tokens, outputs)
        found: list[int] = []
        while len(found) < outputs:
            for _, new in self._step():
                found += new
        return {"tokens": found}

    def usage(self) -> dict[str, Any]:
        """What this process has used."""
        spent = os.times()
        return {
            "cpu_s": spent.user + spent.system,
            "rss": int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
        }

    def _drain(self) -> None:
        while self._engine.has_unfinished_requests():
            self._engine.step()


def say(answer: Any) -> None:
    """One line to the parent, past whatever the library prints."""
    _answers.write(json.dumps(answer) + "\n")
    _answers.flush()


def main(model: str, kv_tokens: str, token_bytes: str, mode: str) -> None:
    """Answer commands until the input ends. ``mode``: compiled, eager, or avx2: eager with its kernels for AVX2."""
    if mode == "avx2":
        cpu: Any = import_module("torch").cpu
        cpu._is_avx512_supported = cpu._is_avx512_bf16_supported = lambda: False
        cpu._is_amx_tile_supported = lambda: False
    engine = VLLM(model, int(kv_tokens), int(token_bytes), compiled=mode == "compiled")
    say(engine.usage())
    for line in sys.stdin:
        command = json.loads(line)
        say(getattr(engine, command.pop("do"))(**command))


if __name__ == "__main__":
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library logs there
    main(*sys.argv[1:])
