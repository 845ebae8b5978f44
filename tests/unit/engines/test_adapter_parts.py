"""The pure parts of adapters: speed from sums, what was run lately, what servers say, and what they must not say."""

import asyncio
import time  # noqa: TID251 - of the processor, not of the clock
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.adapter.dialect import Ask, Facts, Figures, Request, failure
from engines.adapter.pace import Pace
from engines.adapter.ran import Ran
from engines.adapter.server import StockServer
from engines.sglang.adapter import SGLang
from engines.vllm.adapter import PRIORITY_MS, VLLM
from engines.vllm.chains import spelled, tenant_of
from tracehaul.wire.cluster import ASSUMED
from tracehaul.wire.errors import ClusterError, ContextTooLong, InvalidRequest, Overloaded, PeerLost, ProtocolError
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import TraceId
from tracehaul.wire.steps import Constraint, Sampling

FACTS = Facts("0", "m", "/m", 100, 1000, 8)
T = TraceId("t")


def ask(**how: object) -> Ask:
    said = {"logprobs": None} | how
    return Ask("r", "t", [1, 2, 3], 3, 8, 0, Sampling(8, **said))  # type: ignore[arg-type]


def test_speed_is_what_was_done_since_the_last_look() -> None:
    pace = Pace()
    pace.look(Figures(prefill_s=1.0, prefill_tokens=10, decode_s=1.0, decode_steps=10))
    assert pace.rates == ASSUMED, "so few say nothing"
    pace.look(Figures(prefill_s=1.2, prefill_tokens=100, decode_s=2.0, decode_steps=100))
    assert (pace.rates.token_s, pace.rates.decode_s) == (pytest.approx(0.012), pytest.approx(0.02))
    pace.look(Figures(prefill_s=1.2 + 2.2, prefill_tokens=200, decode_s=2.0, decode_steps=100))
    assert pace.rates.token_s == pytest.approx(0.012 + 0.3 * (0.022 - 0.012))
    assert pace.rates.decode_s == pytest.approx(0.02)
    pace.look(Figures(prefill_s=0.5, prefill_tokens=100))
    assert pace.rates.token_s == pytest.approx(0.015 + 0.3 * (0.005 - 0.015)), "another life counts from nothing"


def test_what_was_run_lately_is_bounded_and_forgotten() -> None:
    ran = Ran(bytes_max=40)
    ran.add("", T, pack_tokens([1, 2, 3, 4]))
    assert ran.shared("", T, pack_tokens([1, 2, 9, 9, 9])) == 2
    assert ran.shared("other", T, pack_tokens([1, 2])) == 0
    ran.add("", TraceId("u"), pack_tokens(range(6)))
    assert ran.shared("", T, pack_tokens([1])) == 1
    ran.add("", TraceId("v"), pack_tokens([1]))
    assert ran.shared("", T, pack_tokens([1])) == 0, "the oldest gives way"
    ran.forget("", TraceId("u"))
    assert ran.shared("", TraceId("u"), pack_tokens([0])) == 0
    ran.clear()
    assert ran.shared("", TraceId("v"), pack_tokens([1])) == 0


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "bad temperature", InvalidRequest),
        (400, "is longer than the model's context length", ContextTooLong),
        (422, "x", InvalidRequest),
        (429, "x", Overloaded),
        (503, "", Overloaded),
        (500, "x", ClusterError),
        (404, "x", ClusterError),
    ],
)
def test_a_status_has_one_meaning(status: int, message: str, kind: type[Exception]) -> None:
    assert type(failure(status, message)) is kind


@pytest.mark.parametrize("dialect", [SGLang(), VLLM()])
@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"choices": 3}', b'{"output_ids": "x"}', b"\xff"])
def test_nonsense_is_no_answer(dialect: SGLang | VLLM, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        dialect.reader(ask()).read(data)
    with pytest.raises(ProtocolError):
        dialect.figures(data)
    with pytest.raises(ProtocolError):
        dialect.facts([data, data, data])


@pytest.mark.parametrize("value", [b"+Inf", b"1e999", b"1.2.3", b"-"])
def test_a_load_that_is_no_number_is_none(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        VLLM().figures(b"vllm:num_requests_running " + value + b"\n")


def test_a_server_that_tells_fewer_tokens_than_it_counts_is_not_believed() -> None:
    event = {"output_ids": [5], "meta_info": {"completion_tokens": 3}}
    with pytest.raises(ProtocolError):
        SGLang().reader(ask()).read(msgspec.json.encode(event))


def test_how_an_answer_ended_by_the_server_is_told() -> None:
    def ended(reason: dict[str, object]) -> bytes:
        meta = {"completion_tokens": 0, "finish_reason": reason}
        return msgspec.json.encode({"output_ids": [], "meta_info": meta})

    read = SGLang().reader(ask()).read
    assert read(ended({"type": "length", "length": 3})).finish == "length"
    assert read(ended({"type": "stop", "matched": "text"})).finish == "stop"
    with pytest.raises(PeerLost):
        read(ended({"type": "abort", "message": "Abort in waiting queue"}))
    with pytest.raises(Overloaded):
        read(ended({"type": "abort", "message": "full", "status_code": 503, "err_type": None}))
    with pytest.raises(InvalidRequest, match="unknown name"):
        read(ended({"type": "abort", "message": "unknown name", "status_code": 400, "err_type": "BadRequestError"}))
    for reason in ("abort", "error"):
        data = msgspec.json.encode({"choices": [{"token_ids": [], "finish_reason": reason}]})
        with pytest.raises(PeerLost):
            VLLM().reader(ask()).read(data)


def test_what_an_engine_cannot_keep_to_is_refused_before_it_is_asked() -> None:
    thinking = ask(constraint=Constraint("regex", "a", thinking="may"))
    for dialect in (SGLang(), VLLM()):
        with pytest.raises(InvalidRequest, match="reasoned"):
            dialect.request(thinking, FACTS)


def test_a_drawn_seed_is_not_passed_on_and_priorities_only_where_they_count() -> None:
    def body(dialect: SGLang | VLLM, facts: Facts, **how: object) -> dict[str, object]:
        return msgspec.json.decode(dialect.request(msgspec.structs.replace(ask(**how), priority=3), facts).body)

    keen = FACTS._replace(priorities=True)
    for dialect, seed, priority in ((SGLang(), "sampling_seed", 3), (VLLM(), "seed", -3 * PRIORITY_MS)):
        for seeded in (True, False):
            said = body(dialect, FACTS, seed=7, seeded=seeded)
            assert (seed in said.get("sampling_params", said)) == seeded  # type: ignore[operator]
        assert "priority" not in body(dialect, FACTS)
        assert body(dialect, keen)["priority"] == priority


def test_vllm_takes_what_is_due_first_of_the_highest_priority() -> None:
    def place(priority: int, due_s: float) -> int:
        said = msgspec.structs.replace(ask(), priority=priority, due_s=due_s)
        return msgspec.json.decode(VLLM().request(said, FACTS._replace(priorities=True)).body)["priority"]

    order = [place(2, 9e8), place(1, 0.0), place(1, 5.001), place(1, 5.002), place(0, 0.5), place(-1, 0.0)]
    assert order == sorted(order)
    assert len(set(order)) == len(order)


def test_stop_tokens_count_at_sglang_where_its_own_are_among_them() -> None:
    def ignores(dialect: SGLang, stops: tuple[int, ...]) -> object:
        body = msgspec.json.decode(dialect.request(ask(stop_tokens=stops), FACTS).body)
        assert body["sampling_params"]["stop_token_ids"] == list(stops)
        return body["sampling_params"]["ignore_eos"]

    known = SGLang([2, 3])
    assert ignores(known, (2, 3, 9)) is False
    for stops in ((), (9,), (2, 9)):
        assert ignores(known, stops) is True, "it would end at a token that the request does not name"
    assert ignores(SGLang(), (2, 3)) is True


class Parts(httpx.AsyncByteStream):
    """An answer's body, as it comes."""

    def __init__(self, parts: list[bytes]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        for part in self._parts:
            yield part


def events_of(parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    async def main() -> list[bytes]:
        server = StockServer("http://nobody")

        async def send(*_: object, **__: object) -> httpx.Response:
            return httpx.Response(200, stream=Parts(parts))

        monkeypatch.setattr(httpx.AsyncClient, "send", send)
        try:
            return [data async for data in server.events(Request("/", b""))]
        finally:
            await server.aclose()

    return asyncio.run(main())


def test_events_are_lines_wherever_their_parts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"data: a\n\ndata: bc\n: open\ndata: d\n\ndata: [DONE]\n"
    for size in (1, 2, 3, 7, 100):
        parts = [body[at : at + size] for at in range(0, len(body), size)]
        assert events_of(parts, monkeypatch) == [b"a", b"bc", b"d"]
    with pytest.raises(PeerLost, match="no end"):
        events_of([b"data: a\n", b"data: [DONE]"], monkeypatch)
    monkeypatch.setattr("engines.adapter.server.EVENT_BYTES_MAX", 8)
    with pytest.raises(ProtocolError, match="more than 8"):
        events_of([b"data:", b"1234"], monkeypatch)


def test_a_large_event_is_not_copied_with_each_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [b"data: ", *[b"x" * 2048] * 4096, b"\ndata: [DONE]\n"]
    began_s = time.thread_time()
    (data,) = events_of(parts, monkeypatch)
    assert len(data) == 2048 * 4096
    took_s = time.thread_time() - began_s
    assert took_s < 3.0, "8 MiB"


@given(st.text(max_size=60))
def test_any_salt_is_one_that_vllm_takes_and_its_plugin_reads(salt: str) -> None:
    body = msgspec.json.decode(VLLM().request(ask(), FACTS).body)
    assert "cache_salt" not in body
    said = spelled(f"t{salt}")
    assert not set("@/\\\0") & set(said)
    assert tenant_of(SimpleNamespace(cache_salt=said)) == f"t{salt}"


def test_a_salt_that_vllm_does_not_take_is_refused_before_it_is_asked() -> None:
    long = msgspec.structs.replace(ask(), salt="a" * 127 + "/")
    with pytest.raises(InvalidRequest, match="128 characters"):
        VLLM().request(long, FACTS)


def test_salts_of_a_self_test_are_one_to_the_store() -> None:
    (first, _), (second, _) = VLLM().afresh("ab", 0), VLLM().afresh("ab", 1)
    assert first != second
    assert len({tenant_of(SimpleNamespace(cache_salt=spelled(salt))) for salt in (first, second)}) == 1


def test_an_error_is_what_its_message_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told = b'{"error":{"message":"temperature must be positive","type":"BadRequestError","param":null,"code":400}}'

    async def send(*_: object, **__: object) -> httpx.Response:
        return httpx.Response(400, content=told)

    async def main() -> None:
        server = StockServer("http://nobody")
        with pytest.raises(InvalidRequest, match=r"^temperature must be positive$"):
            await server.post(Request("/v1/completions", b"{}"), 1.0)
        with pytest.raises(InvalidRequest, match=r"^temperature must be positive$"):
            await anext(server.events(Request("/v1/completions", b"{}")))
        await server.aclose()

    monkeypatch.setattr(httpx.AsyncClient, "send", send)
    asyncio.run(main())
