"""Logprobs, echoes and forks as clients see them."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.calls.echo import Echo
from router.calls.events import Mark
from router.calls.fakes import IM_END, FakeDispatcher, FakeText, Script
from router.calls.prompts import Prompt
from router.dialects.chat.logprobs import chat_logprobs
from router.dialects.completions.logprobs import text_logprobs
from router.dispatch.steps import Finished, Output, StepRequest
from router.traces.texts import fresh
from tests.unit.router.http.test_calls import CHAT, CHAT_PATH, TEXT, TEXT_PATH, post
from tracehaul.wire.hashing import pack_tokens, unpack_tokens
from tracehaul.wire.steps import StepUsage, TokenLogprobs

USAGE = StepUsage()


def told(token: int, top: int | None) -> TokenLogprobs:
    """Made up, but different for each token."""
    return TokenLogprobs(-token / 64, tuple((token + at, -at / 8) for at in range(top or 0)))


def speak(tokens: Sequence[int], *, at_once: int = 1) -> Any:
    """A script that gives ``tokens`` with the logprobs that were asked for, and those of the prompt before."""

    def script(request: StepRequest) -> Script:
        items: list[Any] = []
        if request.prompt_logprobs is not None:
            scores = [told(token, request.prompt_logprobs) for token in unpack_tokens(request.prompt)[1:]]
            items += [Output([], prompt_logprobs=scores[:2]), Output([], prompt_logprobs=scores[2:])]
        top = request.sampling.logprobs
        for start in range(0, len(tokens), at_once):
            part = list(tokens[start : start + at_once])
            items.append(Output(part, logprobs=None if top is None else [told(token, top) for token in part]))
        return [*items, Finished("stop" if tokens[-1] == IM_END else "length", USAGE)]

    return script


def events_of(text: str) -> list[Any]:
    blocks = [block.removeprefix("data: ") for block in text.split("\n\n")[:-1]]
    assert blocks[-1] == "[DONE]"
    return [msgspec.json.decode(block) for block in blocks[:-1]]


def streamed(path: str, body: Any, script: Any) -> list[Any]:
    answer = post(FakeDispatcher(script), path, body | {"stream": True})
    assert answer.status_code == 200
    return [choice for event in events_of(answer.text) for choice in event["choices"]]


# --- chat ---------------------------------------------------------------------------------------------------


def test_a_chat_tells_each_tokens_logprob() -> None:
    body = post(FakeDispatcher(speak([*"hé".encode(), IM_END])), CHAT_PATH, CHAT | {"logprobs": True}).json()
    choice = body["choices"][0]
    assert choice["logprobs"] == {
        "content": [
            {"token": "h", "logprob": -104 / 64, "bytes": [104], "top_logprobs": []},
            {"token": "\ufffd", "logprob": -0xC3 / 64, "bytes": [0xC3], "top_logprobs": []},
            {"token": "\ufffd", "logprob": -0xA9 / 64, "bytes": [0xA9], "top_logprobs": []},
            {"token": "<|im_end|>", "logprob": -IM_END / 64, "bytes": list(b"<|im_end|>"), "top_logprobs": []},
        ],
        "refusal": None,
    }
    assert body["usage"]["completion_tokens"] == len(choice["logprobs"]["content"])


def test_a_chat_tells_the_likeliest() -> None:
    answer = post(FakeDispatcher(speak([97])), CHAT_PATH, CHAT | {"logprobs": True, "top_logprobs": 2}).json()
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert [(top["token"], top["logprob"], top["bytes"]) for top in entry["top_logprobs"]] == [
        ("a", 0.0, [97]),
        ("b", -0.125, [98]),
    ]


@pytest.mark.parametrize("fields", [{}, {"logprobs": None}, {"logprobs": False}])
def test_a_chat_that_does_not_ask_is_told_none(fields: Any) -> None:
    dispatcher = FakeDispatcher(speak([97]))
    assert post(dispatcher, CHAT_PATH, CHAT | fields).json()["choices"][0]["logprobs"] is None
    assert dispatcher.requests[0].sampling.logprobs is None


@pytest.mark.parametrize("at_once", [1, 2, 9])
@pytest.mark.parametrize("stop", [None, "cd", "lmn"])
def test_a_streams_logprobs_are_those_of_the_whole(at_once: int, stop: str | None) -> None:
    wish = CHAT | {"logprobs": True, "top_logprobs": 1, "stop": stop}
    script = speak([*b"abcdefgh", IM_END], at_once=at_once)
    whole = post(FakeDispatcher(script), CHAT_PATH, wish).json()
    chunks = streamed(CHAT_PATH, wish, script)
    told = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert told == whole["choices"][0]["logprobs"]["content"]
    assert len(told) == whole["usage"]["completion_tokens"]
    text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"] == ("ab" if stop == "cd" else "abcdefgh")


# --- completions --------------------------------------------------------------------------------------------


def test_a_completion_has_the_older_shape() -> None:
    body = post(FakeDispatcher(speak([*"aé".encode()])), TEXT_PATH, TEXT | {"logprobs": 2}).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-97 / 64, -0xC3 / 64, -0xA9 / 64],
        "top_logprobs": [
            {"a": -97 / 64, "b": -0.125},
            {"bytes:\\xc3": -0xC3 / 64, "bytes:\\xc4": -0.125},
            {"bytes:\\xa9": -0xA9 / 64, "bytes:\\xaa": -0.125},
        ],
        "text_offset": [0, 1, 1],
    }


def test_no_alternatives_still_names_the_token() -> None:
    body = post(FakeDispatcher(speak([97])), TEXT_PATH, TEXT | {"logprobs": 0}).json()
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -97 / 64}]
    assert (
        post(FakeDispatcher(speak([97])), TEXT_PATH, TEXT | {"logprobs": None}).json()["choices"][0]["logprobs"] is None
    )


def test_what_is_impossible_is_told_in_json() -> None:
    mark = Mark(97, 0, TokenLogprobs(float("-inf"), ((98, float("-inf")),)))
    assert chat_logprobs(FakeText(), [mark]).content[0].logprob == -9999.0
    assert text_logprobs(FakeText(), [mark]).top_logprobs == [{"b": -9999.0, "a": -9999.0}]


# --- echo ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [["hé", "hi"], [[*"hé".encode()], [104, 105]]])
def test_an_echo_repeats_the_prompt(prompt: Any) -> None:
    body = TEXT | {"prompt": prompt, "echo": True, "n": 2}
    choices = post(FakeDispatcher(speak([97, 98])), TEXT_PATH, body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["héab", "héab", "hiab", "hiab"]
    assert all(choice["logprobs"] is None for choice in choices)
    chunks = streamed(TEXT_PATH, body, speak([97, 98]))
    for index, text in enumerate(["héab", "héab", "hiab", "hiab"]):
        assert "".join(chunk["text"] for chunk in chunks if chunk["index"] == index) == text


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_logprobs_is_one_run_of_tokens(stream: bool) -> None:
    body = TEXT | {"prompt": "the ox", "echo": True, "logprobs": 1, "n": 2}
    dispatcher = FakeDispatcher(speak([97, 98]))
    prompt = FakeText().encode("the ox")
    if stream:
        chunks = streamed(TEXT_PATH, body, speak([97, 98]))
        told = [
            {key: [x for c in chunks if c["index"] == at and c["logprobs"] for x in c["logprobs"][key]] for key in KEYS}
            for at in range(2)
        ]
    else:
        told = [choice["logprobs"] for choice in post(dispatcher, TEXT_PATH, body).json()["choices"]]
        # The prompt is scored once, by the step that computes it.
        assert [request.prompt_logprobs for request in dispatcher.requests] == [1, None]
    for logprobs in told:
        assert "".join(logprobs["tokens"]) == "the oxab"
        assert logprobs["token_logprobs"] == [None, *(-token / 64 for token in [*prompt[1:], 97, 98])]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["text_offset"] == [0, 3, 4, 5, 6, 7]


KEYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.mark.parametrize("logprobs", [None, 0])
def test_only_the_prompt_may_be_wanted(logprobs: int | None) -> None:
    body = TEXT | {"prompt": "abx", "echo": True, "max_tokens": 0, "logprobs": logprobs}
    dispatcher = FakeDispatcher(speak([97, 98]))
    answer = post(dispatcher, TEXT_PATH, body).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abx", "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert dispatcher.requests[0].sampling.max_tokens == 1
    if logprobs is None:
        assert choice["logprobs"] is None
    else:
        assert choice["logprobs"]["tokens"] == ["ab", "x"]


def test_a_prompt_of_one_token_has_nothing_before_it() -> None:
    body = TEXT | {"prompt": "x", "echo": True, "logprobs": 0}
    (choice,) = post(FakeDispatcher(speak([97])), TEXT_PATH, body).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -97 / 64]


class SpacedText(FakeText):
    """Writes a space before the first word, and a token around every text, as some do."""

    def token_bytes(self, token: int) -> bytes:
        return b" hello" if token == 1000 else b"<s>" if token == 1001 else super().token_bytes(token)


def test_offsets_survive_what_a_tokenizer_adds() -> None:
    prompt = Prompt(pack_tokens([1001, 1000, 33]), fresh("hello!", [1001, 1000, 33]))
    echo = Echo(SpacedText(), prompt, scored=True)
    echo.logprobs = [told(1, 0), told(2, 0)]
    assert [mark.offset for mark in echo.marks] == [0, 0, 5]


@given(st.text(max_size=30).filter(lambda text: text.encode(errors="replace") and "<|" not in text))
def test_offsets_are_where_tokens_start(text: str) -> None:
    fake = FakeText()
    text = text.encode(errors="replace").decode()
    ids = fake.encode(text)
    echo = Echo(fake, Prompt(pack_tokens(ids), fresh(text, ids)), scored=True)
    echo.logprobs = [told(1, 0)] * (len(ids) - 1)
    data = b""
    for mark in echo.marks:
        assert mark.offset == sum(byte & 0xC0 != 0x80 for byte in data)
        data += fake.token_bytes(mark.token)
    assert echo.text == text


# --- forks --------------------------------------------------------------------------------------------------


def test_the_other_choices_start_when_the_prompt_is_computed() -> None:
    started: list[str] = []

    def script(request: StepRequest) -> Script:
        started.append(request.step[-1])
        return [0.02, Output([97]), Finished("length", USAGE)] if request.step[-1] in "02" else speak([98])(request)

    dispatcher = FakeDispatcher(script)
    choices = post(dispatcher, TEXT_PATH, TEXT | {"prompt": ["x", "y"], "n": 2}).json()["choices"]
    assert [choice["text"] for choice in choices] == ["a", "b", "a", "b"]
    assert sorted(started[:2]) == ["0", "2"]
    seeds = [request.sampling.seed for request in dispatcher.requests]
    assert len(set(seeds)) == 4


def test_a_seed_gives_each_choice_its_own() -> None:
    first, again = FakeDispatcher(speak([97])), FakeDispatcher(speak([97]))
    for dispatcher in (first, again):
        post(dispatcher, CHAT_PATH, CHAT | {"n": 3, "seed": 9})
    one = FakeDispatcher(speak([97]))
    post(one, CHAT_PATH, CHAT | {"seed": 9})
    seeds = [request.sampling.seed for request in sorted(first.requests, key=lambda request: request.step)]
    assert seeds == [request.sampling.seed for request in sorted(again.requests, key=lambda request: request.step)]
    assert len(set(seeds)) == 3
    assert seeds[0] == one.requests[0].sampling.seed
