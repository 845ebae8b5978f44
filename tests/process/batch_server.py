"""A served script for tests of batches: it prints its port, and serves until its standard input ends.

A prompt says what becomes of it: ``busy`` is refused the first time, ``poison`` breaks whoever computes it. Each that
is begun is a line of the file that the environment names, after its step's class.
"""

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.kept import opened_kept
from cluster.rundir import RunDir
from cluster.webhooks.config import WebhookConfig
from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.bills import Bills
from router.dispatch.steps import StepRequest
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.server import serve
from router.policy.prices import Prices, Tariff
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
    """Serves on a free port, keeps all of it in the folder that the environment names, and tells who that names."""
    offload = ThreadOffload("tokenize")
    receivers = (WebhookConfig(os.environ["RECEIVER"], networks=("127.0.0.0/8",)),) if "RECEIVER" in os.environ else ()
    config = ClusterConfig(webhooks=receivers, api=ApiConfig(files_url=os.environ.get("FILES_URL", "")))
    dispatcher = FakeDispatcher(script)
    bills = Bills(dispatcher.traces, dispatcher.keeper.send, Prices(Tariff()))
    async with opened_kept(config, RunDir(Path(os.environ["KEPT"])), "router-0", offload, bills) as kept:
        texts, parts = {MODEL: FakeText()}, {"jobs": kept.jobs, "chats": kept.chats, "outbox": kept.outbox}
        app = create_app(dispatcher, texts, lambda: b"", config.api, offload, **parts)
        server = await serve(app, "127.0.0.1", 0, grace_s=1)
        print(server.port, flush=True)  # noqa: T201 - who started this waits for it
        await asyncio.to_thread(sys.stdin.read)
        await server.close()
    offload.close()


if __name__ == "__main__":
    asyncio.run(main())
