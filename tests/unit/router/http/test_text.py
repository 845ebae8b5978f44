"""The HTTP surface on a real tokenizer and template: the protocol holds, and remembered texts do not change ids."""

import asyncio
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from router.calls import text as router_text
from router.calls.fakes import FakeDispatcher, Script
from router.dispatch.steps import Finished, Output, StepRequest
from router.http.app import create_app
from router.http.config import ApiConfig
from router.traces.texts import CutTokens, Said, extend, find, remember
from tracehaul.model.text import Text
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import StepUsage

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made() -> Text:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    corpus = ["the quick brown fox jumps over the lazy dog\n\nuser assistant\n hello there, the other\n\n\n"] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")]
    )
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    return Text(tokenizer, TEMPLATE, {"eos_token": "<|im_end|>"}, (end,))


TEXT = made()
PIECES = st.lists(
    st.sampled_from(["the", " the", " other", "\n", "\n\n", " ", "x", "é", "🙂", "<|im_end|>", "<|im_start|>"]),
    max_size=12,
)


def conforms(text: router_text.Text) -> router_text.Text:
    return text


def test_the_protocol_holds() -> None:
    text = conforms(TEXT)
    assert [text.encode(text.token_text(token)) for token in text.eos_tokens] == [[t] for t in text.eos_tokens]


@settings(max_examples=200)
@given(st.lists(PIECES, min_size=2, max_size=4))
def test_any_history_of_edits_gives_fresh_ids(steps: list[list[str]]) -> None:
    cuts = CutTokens({TEXT.token_text(token): token for token in TEXT.eos_tokens})
    texts = ()
    for pieces in steps:
        text = "".join(pieces)
        known = find(reversed(texts), text, cuts)
        encoded = extend(known, text, TEXT.encode(text[len(known.text) :]), cuts)
        assert encoded.ids == TEXT.encode(text)
        texts = remember(texts, Said(encoded))


def test_a_conversation_keeps_the_ids_that_were_generated() -> None:
    # Character by character, where the tokenizer would merge.
    spoken = [TEXT.encode(character)[0] for character in "the other\n\nthere"]

    def script(request: StepRequest) -> Script:
        return [Output([*spoken, TEXT.eos_tokens[0]]), Finished("stop", StepUsage())]

    dispatcher = FakeDispatcher(script)

    async def main() -> None:
        app = create_app(dispatcher, {"org/fake": TEXT}, lambda: b"", ApiConfig(), InlineOffload())
        messages: list[Any] = [{"role": "user", "content": "hello"}]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            for _ in range(3):
                body = {"model": "org/fake", "messages": messages}
                answer = await client.post("/v1/chat/completions", json=body, headers={"X-Trace-Id": "t"})
                messages = [*messages, answer.json()["choices"][0]["message"], {"role": "user", "content": "more"}]

    asyncio.run(main())
    prompts = [unpack_tokens(request.prompt) for request in dispatcher.requests]
    for earlier, later in pairwise(prompts):
        kept = [*earlier, *spoken, TEXT.eos_tokens[0]]
        assert later[: len(kept)] == kept
        assert later != TEXT.encode(TEXT.raw(later))


def test_a_template_that_refuses_is_the_callers_fault() -> None:
    dispatcher = FakeDispatcher(lambda request: [])
    bare = Text(made()._tokenizer, None, {}, ())

    async def main() -> httpx.Response:
        app = create_app(dispatcher, {"org/fake": bare}, lambda: b"", ApiConfig(), InlineOffload())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            body = {"model": "org/fake", "messages": [{"role": "user", "content": "x"}]}
            return await client.post("/v1/chat/completions", json=body)

    answer = asyncio.run(main())
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["plain", "<|im_end|>", "🙂 x"])
def test_streams_show_what_was_said(text: str) -> None:
    stream = conforms(TEXT).stream()
    shown = "".join(stream.push([token]) for token in TEXT.encode(text)) + stream.finish()
    assert shown == text.replace("<|im_end|>", "")
