"""``/v1/traces``, and which trace a conversation is given."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec

from router.calls.call import Conversation
from router.calls.conversation import Lineage, called, lineage, opening
from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dialects.body import parse
from router.dialects.chat.messages import messages_of
from router.dialects.chat.requests import ChatRequest
from router.dialects.openai.tools import names_of
from router.dispatch.steps import Finished, Output, StepRequest
from router.http.app import create_app
from router.http.config import ApiConfig
from router.traces.contexts import Left
from router.traces.decisions import Asked, Moved, Placed, Replaced
from router.traces.events import Answered, Resumed, StepBegan, StepEnded, StepMoved, StepPlaced, Suspended
from router.traces.hits import Changed, Hits
from router.traces.story import story
from router.traces.views import TraceView
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import Unavailable
from tracehaul.wire.ids import BlockHash, NodeId, StepId, TraceId
from tracehaul.wire.steps import StepUsage

PATH = "/v1/chat/completions"


def served(
    use: Callable[[httpx.AsyncClient], Awaitable[None]], dispatcher: FakeDispatcher, text: FakeText | None = None
) -> None:
    async def main() -> None:
        app = create_app(dispatcher, {"org/fake": text or FakeText()}, lambda: b"", ApiConfig(), InlineOffload())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(20):
            await use(client)

    asyncio.run(main())


def body(*messages: tuple[str, str], **fields: Any) -> dict[str, Any]:
    said = [{"role": role, "content": content} for role, content in messages]
    return {"model": "org/fake", "messages": said} | fields


SYSTEM, TASK, ANSWER = ("system", "be brief"), ("user", "count"), ("assistant", "x")


def test_a_conversation_without_a_name_keeps_its_trace_and_forks() -> None:
    dispatcher = FakeDispatcher(say("x"))

    async def use(client: httpx.AsyncClient) -> None:
        first = await client.post(PATH, json=body(SYSTEM, TASK))
        await client.post(PATH, json=body(SYSTEM, TASK, ANSWER, ("user", "one")))
        await client.post(PATH, json=body(SYSTEM, TASK, ANSWER, ("user", "two")))
        await client.post(PATH, json=body(SYSTEM, ("user", "another task")))
        await client.post(PATH, json=body(SYSTEM, TASK, ANSWER, ("user", "one"), cache_salt="red"))
        named = await client.post(PATH, json=body(SYSTEM, TASK), headers={"X-Trace-Id": "mine"})
        assert named.headers["x-trace-id"] == "mine"
        assert first.headers["x-trace-id"] == dispatcher.requests[0].trace

    served(use, dispatcher)
    one, same, fork, other, tenant, named = dispatcher.requests
    assert (same.trace, same.parent) == (one.trace, None)
    assert fork.trace != one.trace
    assert fork.parent == one.trace
    assert (other.parent, tenant.parent, named.parent) == (None, None, None)
    assert len({request.trace for request in dispatcher.requests}) == 5
    assert len({request.agent for request in dispatcher.requests}) == 1


def test_calls_that_begin_alike_are_traces_of_their_own_and_go_on_by_what_was_answered() -> None:
    """Without names, with answers that clients spell their own way."""
    call = '<tool_call>\n{"name": "f", "arguments": {"b": "\u00e9", "a": [1]}}\n</tool_call>'
    answers = iter(["one", " two \n", call, "three", "and on"] * 2)
    dispatcher = FakeDispatcher(lambda request: say(next(answers))(request))
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a":[1], "b":"\\u00e9"}'}}

    async def use(client: httpx.AsyncClient) -> None:
        async def ask(*messages: dict[str, Any], **fields: Any) -> httpx.Response:
            said = [{"role": "system", "content": "S"}, {"role": "user", "content": "count"}, *messages]
            answer = await client.post(PATH, json={"model": "org/fake", "messages": said, "tools": tools} | fields)
            assert answer.status_code == 200
            return answer

        def trace(answer: httpx.Response) -> str:
            return answer.headers["x-trace-id"]

        one, two, called_trace = trace(await ask()), trace(await ask(stream=True)), trace(await ask())
        assert len({one, two, called_trace}) == 3
        question = {"role": "user", "content": "more"}
        again = await ask({"role": "assistant", "content": "two", "reasoning": "hm"}, question)
        assert trace(again) == two
        result = {"role": "tool", "tool_call_id": "x", "content": "r"}
        went_on = await ask({"role": "assistant", "content": None, "tool_calls": [called]}, result)
        assert trace(went_on) == called_trace
        unknown = await ask({"role": "assistant", "content": "never said"}, question)
        assert trace(unknown) not in (one, two, called_trace)
        assert trace(await ask({"role": "assistant", "content": "one"}, question)) == one
        assert trace(await ask({"role": "assistant", "content": "one"}, question, cache_salt="red")) != one

    served(use, dispatcher)
    parents = {request.parent for request in dispatcher.requests[:5]}
    assert parents == {None}, "what begins alike is no fork"


def conversation(request: ChatRequest) -> Lineage:
    return lineage(Conversation(messages_of(request.messages), names_of(request.tools)))


def test_what_messages_say_of_agent_and_tools() -> None:
    def of(**fields: Any) -> ChatRequest:
        return parse(msgspec.json.encode(body(SYSTEM, TASK) | fields), ChatRequest)

    tools = [{"type": "function", "function": {"name": name}} for name in ("bash", "grep")]
    with_tools = conversation(of(tools=tools))
    assert with_tools.agent == conversation(of(tools=tools[::-1])).agent
    assert with_tools.agent != conversation(of()).agent
    assert opening(messages_of(of(tools=tools).messages)) == 1
    assert conversation(of(tools=[{"function": 5}, {}])).agent == conversation(of()).agent
    calls = [{"id": str(i), "function": {"name": name}} for i, name in enumerate(("bash", "bash", "n" * 100))]
    messages = of(messages=[{"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "r"}]).messages
    assert called(messages_of(messages)) == ("bash", "n" * 64)
    assert called(messages_of(of().messages)) == ()


def fill(dispatcher: FakeDispatcher, *names: str, salt: str = "") -> None:
    """A step of each, told as it goes, with what is decided for it."""
    for name in names:
        key, step = (salt, TraceId(name)), StepId(f"{name}-1")
        placed = Placed(
            step, NodeId("decode-0"), "warm", 40, 32, NodeId("decode-0"), 38, 38, None, None, {"decode-0": 1}, 0.25
        )
        left = Left(step, BlockHash(b"r" * 16), 4, bytes(40), b"", 8, None)
        hits = Hits(39, 32, 38, 32, {"evicted": 7})
        for at_s, event in (
            (0.0, StepBegan(key, step, None, 40)),
            (0.0, StepPlaced(key, placed, None, False)),
            (0.5, StepMoved(key, Moved(step, NodeId("decode-0"), "peer_lost", 2))),
            (0.7, StepMoved(key, Replaced(step, NodeId("prefill-0"), 20.0, 5.5))),
            (1.5, StepEnded(key, step, "stop", 3, hits, left, 0.0, False)),
        ):
            dispatcher.traces.handle(event, at_s)


def test_the_list_is_paged_and_each_tenants_own() -> None:
    dispatcher = FakeDispatcher(say("x"))
    fill(dispatcher, "a", "b", "c")
    fill(dispatcher, "secret", salt="red")

    async def use(client: httpx.AsyncClient) -> None:
        page = (await client.get("/v1/traces?limit=2")).json()
        assert ([t["id"] for t in page["data"]], page["has_more"], page["last_id"]) == (["c", "b"], True, "b")
        summary = page["data"][0]
        assert (summary["state"], summary["steps"], summary["context_tokens"]) == ("acting", 1, 10)
        page = (await client.get("/v1/traces", params={"after": "b"})).json()
        assert ([t["id"] for t in page["data"]], page["has_more"]) == (["a"], False)
        page = (await client.get("/v1/traces", params={"cache_salt": "red"})).json()
        assert [t["id"] for t in page["data"]] == ["secret"]
        assert (await client.get("/v1/traces/secret")).status_code == 404
        for bad, param in (("limit=0", "limit"), ("limit=x", "limit"), ("limit=101", "limit"), ("after=z", "after")):
            answer = await client.get(f"/v1/traces?{bad}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert (await client.get("/v1/traces", params={"cache_salt": "x" * 1000})).status_code == 400

    served(use, dispatcher)


def test_one_trace_and_its_end() -> None:
    dispatcher = FakeDispatcher(say("x"))
    fill(dispatcher, "org/a")

    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/traces/org/a")
        view = msgspec.json.decode(answer.content, type=TraceView)
        assert (view.id, view.state, view.context_tokens, view.steps_count) == ("org/a", "acting", 10, 1)
        assert (view.steps[0].seconds, view.steps[0].ending, view.steps[0].decode) == (1.5, "stop", "decode-0")
        assert (view.service.tokens_computed, view.service.tokens_decoded) == (8, 3)
        gone = await client.delete("/v1/traces/org/a")
        assert gone.json() == {"id": "org/a", "deleted": True, "object": "trace.deleted"}
        for method in ("GET", "DELETE"):
            answer = await client.request(method, "/v1/traces/org/a")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "trace_not_found")

    served(use, dispatcher)
    assert dispatcher.deleted == ["org/a"]


def test_a_trace_is_told_in_plain_words() -> None:
    dispatcher = FakeDispatcher(say("x"))
    fill(dispatcher, "a")
    told: list[str] = []

    async def use(client: httpx.AsyncClient) -> None:
        dispatcher.keeper.send(Suspended(("", TraceId("a")), 5.0, None, None))
        dispatcher.keeper.send(Resumed(("", TraceId("a"))))
        answer = await client.get("/v1/traces/a")
        told.extend(story(msgspec.json.decode(answer.content, type=TraceView)))

    served(use, dispatcher)
    assert told[0].startswith("Trace a is acting for")
    lines = [line.split("ago  ")[1] for line in told[1:]]
    assert lines == [
        "Step a-1: 40 tokens, of which the stores held 32 and decode-0 kept 38. Put on decode-0 (warm, "
        "250 ms of work and waiting; running: decode-0 1), expecting 38 cached; what is missing is computed there, "
        "new blocks go to no store.",
        "Step a-1: decode-0 failed (peer_lost); it goes on elsewhere, the 2 tokens that the client has are kept.",
        "Step a-1 would wait 20.0 s more at prefill-0, and another place has become free: all of it is expected to "
        "take 5.5 s there.",
        "Step a-1 ended (stop) after 1.5 s with 3 tokens. Cached: 32 of the 39 tokens that its trace had. "
        "7 had been evicted.",
        "The client asked to suspend (expected_s 5.0).",
        "It waits: 5.0 s expected, at most 5.0 s (seen 0 times). 10 tokens that take 0 ms to pull are worth 15.0 s in "
        "the store; it comes back after 4.8 s.",
        "The client asked to resume.",
    ]


def test_what_a_client_changed_is_told_in_plain_words() -> None:
    dispatcher = FakeDispatcher(say("x"))
    key, told = ("", TraceId("c")), list[str]()
    changes = (
        (Changed("tools", None, 0, 9, 8), "its tools"),
        (Changed("variables", None, 0, 9, 7), "its variables"),
        (Changed("system", 0, 5, 9, 6), "message 0 (system)"),
        (Changed("messages", 3, 5, 9, 5), "message 3 (messages)"),
    )

    async def use(client: httpx.AsyncClient) -> None:
        for at, (changed, _) in enumerate(changes):
            step = StepId(f"c-{at}")
            dispatcher.keeper.send(StepBegan(key, step, None, 40))
            dispatcher.keeper.send(StepEnded(key, step, "stop", 3, Hits(changed=changed), None, 0.0, final=False))
        answer = await client.get("/v1/traces/c")
        told.extend(story(msgspec.json.decode(answer.content, type=TraceView)))

    served(use, dispatcher)
    assert [line.split("Its client ")[1] for line in told if "Its client " in line] == [
        f"changed {what}: {changed.tokens} tokens more could not be used (prompt_changed)." for changed, what in changes
    ]


def test_clients_may_say_what_happens() -> None:
    dispatcher = FakeDispatcher(say("x"))
    fill(dispatcher, "a")

    async def use(client: httpx.AsyncClient) -> None:
        async def post(path: str, body: object = None) -> httpx.Response:
            return await client.post(f"/v1/traces/{path}", content=b"" if body is None else msgspec.json.encode(body))

        answer = await post("a/suspend", {"expected_s": 60, "deadline_s": 600, "tool": "make"})
        assert (answer.status_code, answer.json()["id"]) == (200, "a")
        assert (await post("a/resume")).status_code == 200
        pinned = await post("a/pin", {"ttl_s": 30, "replicas": 2})
        assert pinned.json() == {"id": "a", "blocks": 5, "held": 4, "remaining_s": 60.0, "object": "trace.pin"}
        assert (await post("a/pin", {"ttl_s": 0})).status_code == 200
        refused = await post("a/pin", {"kind": "hard"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        for action, body in (("suspend", {"expected_s": 1}), ("resume", {}), ("pin", {})):
            assert (await post(f"nobody/{action}", body)).status_code == 404
        for action, body, param in (
            ("suspend", {}, "expected_s"),
            ("suspend", {"expected_s": -1}, "expected_s"),
            ("suspend", {"expected_s": 1, "deadline_s": 0}, "deadline_s"),
            ("suspend", {"expected_s": "soon"}, "expected_s"),
            ("suspend", {"expected_s": 1, "tool": ""}, "tool"),
            ("suspend", {"expected_s": 1, "more": 1}, None),
            ("resume", {"now": True}, None),
            ("pin", {"ttl_s": 1e12}, "ttl_s"),
            ("pin", {"kind": "firm"}, "kind"),
            ("pin", {"replicas": 0}, "replicas"),
        ):
            answer = await post(f"a/{action}", body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (action, body)
        assert (await client.post("/v1/traces/a/suspend", content=b"x" * 20000)).status_code == 413

        dispatcher.keeper.send(StepBegan(("", TraceId("a")), StepId("a-2"), None, 1))
        for action, body in (("suspend", {"expected_s": 1}), ("resume", {})):
            busy = await post(f"a/{action}", body)
            assert (busy.status_code, busy.json()["error"]["code"]) == (409, "trace_busy")

    served(use, dispatcher)
    assert dispatcher.keeper.told == [
        ("pin", "a", "soft", 1024.0, 2),
        ("unpin", "a"),
        ("pin", "a", "hard", 1024.0, 1),
    ]
    trace = dispatcher.traces.get(("", TraceId("a")))
    assert trace is not None
    asked = [entry.decision for entry in trace.decisions if isinstance(entry.decision, Asked)]
    assert [decision.what for decision in asked] == ["suspend", "resume", "pin", "pin", "pin"]
    assert asked[0].inputs == {"expected_s": 60.0, "deadline_s": 600.0, "tool": "make"}
    assert msgspec.json.encode(asked[2]).endswith(b'{"kind":"soft","ttl_s":30.0,"priority":1024.0,"replicas":2}}')


def answers(dispatcher: FakeDispatcher) -> dict[StepId, Answered]:
    """What the call layer told of each step; it tells once."""
    told = [event for event in dispatcher.keeper.events if isinstance(event, Answered)]
    assert len({event.step for event in told}) == len(told)
    return {event.step: event for event in told}


def test_each_step_is_answered_once_however_it_ends() -> None:
    def script(request: StepRequest) -> Script:
        told = Output(list(b"ab"), StepUsage())
        match request.trace:
            case "fails":
                return [told, Unavailable("gone")]
            case "left":
                return [told, 30.0, Finished("stop", StepUsage())]
            case _:
                return [told, Finished("length", StepUsage())]

    dispatcher = FakeDispatcher(script)

    async def use(client: httpx.AsyncClient) -> None:
        async def post(trace: str, **fields: Any) -> int:
            return (await client.post(PATH, json=body(TASK, **fields), headers={"x-trace-id": trace})).status_code

        assert await post("whole", n=3) == 200
        assert await post("stopped", stop=["b"]) == 200
        assert await post("streamed", stream=True) == 200
        assert await post("fails", n=2) == 503
        leaving = asyncio.create_task(post("left"))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.wait([leaving])
        texts = {"model": "org/fake", "prompt": ["one", "two"], "max_tokens": 2}
        assert (await client.post("/v1/completions", json=texts, headers={"x-trace-id": "text"})).status_code == 200

    served(use, dispatcher)
    told = answers(dispatcher)
    began = {request.step: request for request in dispatcher.requests}
    assert began.keys() <= told.keys(), "what never began may be told, too"
    by_trace: dict[str, list[Answered]] = {}
    for step, request in began.items():
        by_trace.setdefault(request.trace, []).append(told[step])
    heard = {trace: [event.said.answer if event.said else None for event in of] for trace, of in by_trace.items()}
    assert heard == {
        "whole": ["ab", "ab", "ab"],
        "stopped": [""],
        "streamed": ["ab"],
        "fails": [None, None],
        "left": [None],
        "text": ["ab"],
        "text.1": ["ab"],
    }
    assert {trace: of[0].tools for trace, of in by_trace.items()} == {
        "whole": (), "stopped": (), "streamed": (), "fails": None, "left": None, "text": None, "text.1": None
    }  # fmt: skip
    assert [of[0].response is None for of in by_trace.values()] == [*6 * [False], True]
    assert all(not trace.unanswered for trace in dispatcher.traces.all())


def test_a_deleted_trace_leaves_no_text_and_no_response() -> None:
    dispatcher = FakeDispatcher(say("x"))
    text = FakeText()
    tokenized: list[int] = []

    async def use(client: httpx.AsyncClient) -> None:
        async def ask(**fields: Any) -> httpx.Response:
            answer = await client.post(PATH, json=body(SYSTEM, TASK, **fields))
            tokenized.append(sum(map(len, text.encoded)))
            text.encoded.clear()
            return answer

        first = await ask()
        trace, response = first.headers["x-trace-id"], first.json()["id"]
        again = await ask(previous_response_id=response)
        assert again.headers["x-trace-id"] == trace
        stranger = await ask(previous_response_id=response, cache_salt="red")
        assert stranger.headers["x-trace-id"] != trace, "another tenant cannot name it"
        await client.delete(f"/v1/traces/{trace}")
        assert (await ask(previous_response_id=response)).headers["x-trace-id"] != trace
        assert (await ask(cache_salt="blue")).status_code == 200

    served(use, dispatcher, text)
    assert tokenized[1] == 0, "all of it was known"
    assert tokenized[0] == tokenized[2] == tokenized[3] == tokenized[4] > 0


def test_a_refused_call_leaves_no_trace() -> None:
    dispatcher = FakeDispatcher(say("x"), context_max=8)

    async def use(client: httpx.AsyncClient) -> None:
        assert (await client.post(PATH, json=body(SYSTEM, TASK))).status_code == 400

    served(use, dispatcher)
    assert (len(dispatcher.traces), dispatcher.traces.nbytes) == (0, 0)
