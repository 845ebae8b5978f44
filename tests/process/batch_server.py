"""A served script for tests of batches: it prints its port, and serves until its standard input ends.

A prompt says what becomes of it: ``busy`` is refused the first time, ``poison`` breaks whoever computes it. Each that
is begun is a line of the file that the environment names, after its step's class.
"""

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

from cluster.kept_jobs import opened_jobs
from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import StepRequest
from router.http import ApiConfig, create_app, serve
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.wire.errors import Overloaded
from tracehaul.wire.hashing import unpack_tokens

MODEL = "org/fake"
ASKED = Path(os.environ["ASKED"])
SLOW_S = float(os.environ.get("SLOW_S", "0.05"))
seen: Counter[str] = Counter()


def script(request: StepRequest) -> Script:
    """As the prompt says."""
    prompt = FakeText().stream().push(unpack_tokens(request.prompt))
    seen[prompt] += 1
    with ASKED.open("a") as file:
        file.write(f"{request.step_class} {prompt.splitlines()[-2] if len(prompt.splitlines()) > 1 else prompt}\n")
    if "busy" in prompt and seen[prompt] == 1:
        return [Overloaded("not now")]
    if "poison" in prompt:
        return [RuntimeError("it broke")]
    return [SLOW_S, *say("héllo 🙂")(request)]


async def main() -> None:
    """Serves on a free port, and keeps files and batches in the folder that the environment names."""
    offload = ThreadOffload("tokenize")
    config = ApiConfig()
    async with opened_jobs(Path(os.environ["KEPT"]), config) as jobs:
        app = create_app(FakeDispatcher(script), {MODEL: FakeText()}, lambda: b"", config, offload, jobs=jobs)
        server = await serve(app, "127.0.0.1", 0, grace_s=1)
        print(server.port, flush=True)  # noqa: T201 - who started this waits for it
        await asyncio.to_thread(sys.stdin.read)
        await server.close()
    offload.close()


if __name__ == "__main__":
    asyncio.run(main())
