"""Every seat, by the messages of steps: our own engine, and stock servers over HTTP of each shape."""

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

import msgspec
import pytest

from engines.vllm.chains import tenant_of
from tests.seats import INFO, KINDS, ROOT, STOCK, Place, play, until
from tracehaul.engine.fake import EngineCost, expected_output
from tracehaul.rpc.base import NO_CONTEXT
from tracehaul.runtime import clock
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.errors import (
    BudgetExceeded,
    CannotContinue,
    ClusterError,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    WrongNode,
)
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import BlockHash, StepId, TraceId
from tracehaul.wire.spent import Allowance
from tracehaul.wire.steps import Constraint, ForgetContext, KeepContext, PrefillStep, Resident, Sampling

PROMPT = list(range(1, 22))
TENANT = "acme/someone@example.com"
LONG = [(7 * n) % 251 for n in range(200)]
GREEDY = {"temperature": 0.0}
SLOW = EngineCost(iteration_s=0.02)


def expected(prompt: list[int], sampling: Sampling) -> list[int]:
    return expected_output(prompt, sampling, INFO.vocab_size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_told_token_by_token_and_ends_once(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        sampling = Sampling(12, **GREEDY)
        told = await place.run(sat, place.request(PROMPT, sampling))
        assert told.tokens == expected(PROMPT, sampling)
        assert told.messages == 13, "one message for each token as it comes"
        assert told.end.reason == "length"
        usage = told.end.usage
        assert (usage.prompt_tokens, usage.output_tokens, usage.computed_from) == (21, 12, 0)
        assert told.end.retained_tokens == 32
        info = sat.seat.info
        assert (info.root, info.context_max, info.block_tokens) == (ROOT, 1024, 8)
        assert info.engine == kind.split()[0]
        assert await sat.seat.service.call(Ping(), NO_CONTEXT) == Ok()
        assert sat.seat.load().running == 0

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_with_its_stop_token_and_not_before_its_least_length(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        free = expected(PROMPT, Sampling(12, **GREEDY))
        stop = Sampling(12, stop_tokens=(free[3],), **GREEDY)
        told = await place.run(sat, place.request(PROMPT, stop))
        assert (told.tokens, told.end.reason) == (free[:4], "stop")
        if kind != "native":
            await until(lambda: not sat.engine.running, 1.0)  # nor does its server go on
        later = Sampling(12, stop_tokens=(free[3],), min_tokens=6, **GREEDY)
        told = await place.run(sat, place.request(PROMPT, later))
        assert told.tokens == expected(PROMPT, later)
        assert len(told.tokens) >= 6

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_of_sampling_reaches_the_engine(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        for sampling in (
            Sampling(8, temperature=1.3, seed=7),
            Sampling(8, temperature=1.5, seed=8, top_p=0.4),
            Sampling(8, temperature=1.5, seed=9, top_k=3),
            Sampling(8, temperature=1.5, seed=10, min_p=0.5),
            Sampling(8, repetition_penalty=1.9, **GREEDY),
            Sampling(8, presence_penalty=1.5, frequency_penalty=1.0, **GREEDY),
            Sampling(8, logit_bias=((65, 50.0),), **GREEDY),
        ):
            told = await place.run(sat, place.request(PROMPT, sampling))
            assert told.tokens == expected(PROMPT, sampling), sampling

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_was_begun_elsewhere_goes_on_where_that_is_the_same(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        sampling = Sampling(10, min_tokens=7, stop_tokens=(expected(PROMPT, Sampling(10, **GREEDY))[8],), **GREEDY)
        whole = expected(PROMPT, sampling)
        for emitted in (1, 5):
            told = await place.run(sat, place.request(PROMPT, sampling, whole[:emitted]))
            assert told.tokens == whole[emitted:]
            assert told.end.usage.output_tokens == len(whole)
        for penalized in (
            Sampling(6, frequency_penalty=1.5, **GREEDY),
            Sampling(6, constraint=Constraint("regex", "[a-z]{6}"), **GREEDY),
        ):
            first = await place.run(sat, place.request(PROMPT, penalized))
            rest = place.request(PROMPT, penalized, first.tokens[:3])
            if kind == "native":
                assert (await place.run(sat, rest)).tokens == first.tokens[3:]
                continue
            assert {"penalties", "constraints", "seeds"} <= set(sat.seat.info.lacks)
            with pytest.raises(CannotContinue):
                await place.run(sat, rest)
        with pytest.raises(InvalidRequest):
            await place.run(sat, place.request(PROMPT, sampling, whole + [1] * 10))

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_keep_to_schemas_and_grammars(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        assert "constraints" in sat.seat.info.features
        end = INFO.vocab_size - 1
        for constraint, text in (
            (Constraint("regex", "ab{3}c"), "abbbc"),
            (Constraint("json_schema", '{"const": 42}'), "42"),
            (Constraint("grammar", 'start: "x" "yz"'), "xyz"),
        ):
            sampling = Sampling(20, constraint=constraint, stop_tokens=(end,), **GREEDY)
            told = await place.run(sat, place.request(PROMPT, sampling))
            assert bytes(told.tokens[:-1]).decode() == text
            assert (told.tokens[-1], told.end.reason) == (end, "stop")
        if kind.startswith("sglang"):
            bad = Sampling(20, constraint=Constraint("grammar", "start: nothere"), **GREEDY)
            with pytest.raises(InvalidRequest, match="Failed to compile"):
                await place.run(sat, place.request(PROMPT, bad))

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_the_models_own_for_output_and_prompt(kind: str) -> None:
    async def case(place: Place) -> None:
        native, sat = await place.seat("native"), await place.seat(kind)
        sampling = Sampling(5, logprobs=3, **GREEDY)
        for top in (None, 0, 2):
            request = place.request(PROMPT, sampling, prompt_logprobs=top)
            wanted, told = await place.run(native, request), await place.run(sat, request)
            assert told.tokens == wanted.tokens
            assert len(told.logprobs) == 5
            assert [(len(item.top), item.top[0][0]) for item in told.logprobs] == [(3, t) for t in told.tokens]
            assert told.logprobs == pytest.approx(wanted.logprobs) or told.logprobs == wanted.logprobs
            assert told.scores == wanted.scores
            assert len(told.scores) == (0 if top is None else len(PROMPT) - 1)
        own = await place.run(sat, place.request(PROMPT, Sampling(3, logprobs=0, **GREEDY)))
        assert [item.top for item in own.logprobs] == [(), (), ()]

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_there_already_is_told_by_where_it_was(kind: str) -> None:
    async def case(place: Place) -> None:
        first, second = await place.seat(kind), await place.seat(kind)
        sampling = Sampling(2, **GREEDY)
        before = await place.run(first, place.request(LONG, sampling, trace="a"))
        assert before.end.usage.computed_from == 0
        # vLLM tells at the end alone.
        assert [usage.computed_from for usage in before.usages] == ([] if kind == "vllm" else [0])
        longer = LONG + before.tokens
        for _ in range(100):
            there = await place.run(first, place.request(longer, sampling, trace="a"))
            if there.end.published_tokens >= 200:
                break
            await asyncio.sleep(0.01)
        assert there.end.usage.computed_from >= 192
        assert there.end.usage.resident_tokens >= 192
        assert there.end.published_tokens >= 200
        elsewhere = await place.run(second, place.request(longer, sampling, trace="a"))
        assert elsewhere.tokens == there.tokens == expected(longer, sampling)
        usage = elsewhere.end.usage
        assert usage.computed_from >= 200
        # vLLM tells how many there were, and not from where.
        assert (usage.resident_tokens, usage.pulled_tokens) == (
            (200, 0) if kind == "vllm" else (0, usage.computed_from)
        )
        other = await place.run(second, place.request(longer, sampling, salt=TENANT))
        assert other.tokens == elsewhere.tokens
        if kind == "native":
            assert other.end.usage.computed_from == 0
        else:
            said = second.engine.asked[-1]["cache_salt"]
            assert (tenant_of(SimpleNamespace(cache_salt=said)) if kind == "vllm" else said) == TENANT

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_computed_by_one_and_decoded_by_another_through_the_store(kind: str) -> None:
    async def case(place: Place) -> None:
        prefill, decode = await place.seat(kind, "prefill"), await place.seat(kind)
        if kind != "native":
            prefill.engine.publish_after_s = 0.2  # the plugin writes through after the answer
        for sampling in (Sampling(6, **GREEDY), Sampling(6, temperature=1.2, seed=3)):
            prompt = [int(sampling.temperature * 10), *LONG]
            told = await place.run(decode, place.request(prompt, sampling, prefill=prefill.seat.info.node))
            assert told.tokens == expected(prompt, sampling)
            assert told.end.usage.computed_from == 0, "what the prefill worker computed was not cached"
            assert told.end.usage.prefill_fallback == ""
            assert told.end.published_tokens >= 200
            if kind != "native":
                hits = decode.engine.asked[-1]
                assert len(hits.get("input_ids") or hits["prompt"]) == 201 + (sampling.temperature == 0)
        if kind != "native":
            assert decode.engine.prefill_tokens <= 2 * 8, "the decode leg pulls"
            assert prefill.engine.prefill_tokens >= 402

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_is_told_with_its_token_and_what_the_store_has(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, "prefill")
        sampling = Sampling(4, logprobs=1, **GREEDY)
        step = PrefillStep(StepId("s"), TraceId("t"), ROOT, pack_tokens(LONG), "", None, sampling, 0, TraceId("t"))
        async with aclosing(place.stream(sat, step)) as replies:
            told = [reply async for reply in replies]
        (token,) = [reply for reply in told if type(reply).__name__ == "PrefillToken"]
        assert token.token == expected(LONG, sampling)[0]  # type: ignore[union-attr]
        assert token.computed_from == 0  # type: ignore[union-attr]
        assert len(token.logprobs.top) == 1  # type: ignore[union-attr]
        assert type(told[-1]).__name__ == "PrefillDone"
        assert told[-1].published_tokens == 200  # type: ignore[union-attr]
        assert not sat.seat.info.features
        with pytest.raises(WrongNode):
            await place.run(sat, place.request(PROMPT, sampling))

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_stream_ends_the_step_where_it_is_computed_within_a_second(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW)
        for scored in (None, 1):
            request = place.request(PROMPT, Sampling(900, **GREEDY), prompt_logprobs=scored)
            async with aclosing(place.stream(sat, request)) as replies:
                if scored is None or kind != "vllm":
                    await anext(replies)
                else:  # nothing of it is streamed
                    leaving = asyncio.ensure_future(anext(replies))
                    await until(lambda: len(sat.engine.running) == 1)
                    leaving.cancel()
                    await asyncio.gather(leaving, return_exceptions=True)
            left_s = clock.now_s()
            await until(lambda: sat.seat.load().running == 0, 1.0)
            if kind != "native":
                await until(lambda: not sat.engine.running, 1.0)
            assert clock.now_s() - left_s < 1.0
        again = Sampling(3, **GREEDY)
        assert (await place.run(sat, place.request(PROMPT, again))).tokens == expected(PROMPT, again)

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_ends_a_step_wherever_it_waits(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW)
        began_s = clock.now_s()
        with pytest.raises(DeadlineExceeded):
            await place.run(sat, place.request(PROMPT, Sampling(900, **GREEDY), deadline_in_s=0.2))
        assert clock.now_s() - began_s < 1.0
        await until(lambda: sat.seat.load().running == 0, 1.0)
        if kind != "native":
            await until(lambda: not sat.engine.running, 1.0)

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_in_the_fleets_own_words(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        sampling = Sampling(4, **GREEDY)
        with pytest.raises(WrongNode):
            await place.run(sat, place.request(PROMPT, sampling, root=BlockHash(b"x" * 16)))
        with pytest.raises(ContextTooLong):
            await place.run(sat, place.request([1] * 1024, sampling))
        with pytest.raises(ClusterError):
            await place.run(sat, place.request([], sampling))
        full = await place.run(sat, place.request([1] * 1020, Sampling(50, **GREEDY)))
        assert (len(full.tokens), full.end.reason) == (4, "length")
        service = sat.seat.service
        assert await service.call(KeepContext(TraceId("t"), "", 1.0), NO_CONTEXT) == Resident(0)
        assert await service.call(ForgetContext(TraceId("t"), ""), NO_CONTEXT) == Resident(0)
        assert sat.seat.load().running == 0

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_a_seat_says_its_servers_load_and_speed(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW)
        async with aclosing(place.stream(sat, place.request(LONG, Sampling(90, **GREEDY)))) as replies:
            await anext(replies)
            assert sat.seat.load().running == 1
            await until(lambda: sat.seat.load().free_tokens < 16384)
            await until(lambda: sat.seat.load().token_s == pytest.approx(1e-3))
            if kind == "vllm":
                async for _ in replies:
                    pass
                await until(lambda: sat.seat.load().decode_s == pytest.approx(1e-2))
        load = sat.seat.load()
        assert load.bytes_max == 16384 * INFO.layout.token_bytes
        assert sat.seat.info.limits.kv_tokens_max == 16384
        assert sat.seat.info.rates.token_s == pytest.approx(1e-3)

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_charged_for_what_it_took_and_nobody_else(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW)
        sat.seat.load()
        request = place.request(PROMPT, Sampling(8, **GREEDY))
        told = await place.run(sat, request)
        reading, load = told.end.usage.reading, sat.seat.load()
        assert reading.account > 0
        assert min(reading.spent.prefill_s, reading.spent.decode_s) > 0
        assert reading.spent.recompute_s == 0
        [charge] = [charge for charge in load.charges if charge.step]
        assert charge.reading == reading
        assert (charge.trace, charge.step, charge.salt) == (request.trace, request.step, "")
        assert load.busy_s == pytest.approx(reading.spent.worker_s)
        assert load.up_s > load.busy_s

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_computes_again_is_told_apart(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW)
        request = msgspec.structs.replace(place.request(LONG, Sampling(2, **GREEDY)), known_tokens=len(LONG) // 2)
        spent = (await place.run(sat, request)).end.usage.reading.spent
        share = spent.recompute_s / (spent.recompute_s + spent.prefill_s)
        assert 0.2 < share < 0.6  # of the prompt's tokens the first half, each of which has less before it

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_ends_when_it_has_spent_what_it_may(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW)
        request = place.request(PROMPT, Sampling(300, **GREEDY))
        whole = (await place.run(sat, place.request(PROMPT, Sampling(40, **GREEDY)))).end.usage.reading.spent
        sat.seat.load()
        poor = msgspec.structs.replace(request, allowance=Allowance(whole.worker_s, 1.0, 1.0))
        before_s = sat.seat.load().busy_s
        with pytest.raises(BudgetExceeded):
            await place.run(sat, poor)
        took_s = sat.seat.load().busy_s - before_s
        assert whole.worker_s <= took_s < 3 * whole.worker_s + 0.5
        with pytest.raises(BudgetExceeded):
            await place.run(sat, msgspec.structs.replace(poor, allowance=Allowance(0.0, 1.0, 1.0)))

    play(case)
