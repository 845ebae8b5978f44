"""A served script: ``python tests/clients/server.py`` prints its port, and serves until its standard input ends.

A process of its own, as clients need other packages than the server does.
"""

import asyncio
import sys

from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import StepRequest
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.server import serve
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.wire.hashing import unpack_tokens

MODEL = "org/fake"
CALLS = {
    "weather": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    "finish": '<tool_call>\n{"name": "bash", "arguments": {"command": '
    '"echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; cat notes"}}\n</tool_call>',
    "look": '<tool_call>\n{"name": "bash", "arguments": {"command": "echo seen > notes; echo wrote it"}}\n</tool_call>',
}
CITY = '{"city": "Paris", "country": "France"}'


def script(request: StepRequest) -> Script:
    """What the prompt asks for: a tool's result is followed by its text, an agent's second look by its end."""
    prompt = FakeText().stream().push(unpack_tokens(request.prompt))
    if "wrote it" in prompt:
        return say(CALLS["finish"])(request)
    if "sunny" in prompt:
        return say("It is sunny in Paris.")(request)
    for word in ("weather", "look"):
        if word in prompt:
            return say(CALLS[word])(request)
    if "capital" in prompt:
        return say(CITY)(request)
    return say("héllo 🙂")(request)


async def main() -> None:
    """Serves on a free port."""
    offload = ThreadOffload("tokenize")
    app = create_app(FakeDispatcher(script), {MODEL: FakeText()}, lambda: b"", ApiConfig(), offload)
    server = await serve(app, "127.0.0.1", 0, grace_s=1)
    print(server.port, flush=True)  # noqa: T201 - who started this waits for it
    await asyncio.to_thread(sys.stdin.read)
    await server.close()
    offload.close()


if __name__ == "__main__":
    asyncio.run(main())
