"""How much of an agent's own answers its next prompt finds again, to the token.

Recorded conversations are played through the router's HTTP surface, with the chat templates of several families and
clients that re-spell what they send back. What a model says is written by rule in its family's format; the tokens of
an answer are not those that its text would be cut into. Of each prompt it counts which of the last answer's tokens
stand in it where they were generated.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import typer
from rich.console import Console
from tokenizers import Tokenizer

from bench.common.report import Result, finish
from bench.prefix.clients import CLIENTS, Message
from bench.prefix.conversations import Answer, Conversation, read
from bench.prefix.families import FAMILIES, Family, Pen
from router.calls.fakes import FakeDispatcher, Script
from router.dispatch.steps import Finished, Output, StepRequest, Tell
from router.http.app import create_app
from router.http.config import ApiConfig
from tracehaul.model.source import resolve
from tracehaul.model.text import Text
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import StepUsage

MODEL = "org/fake"
CONTEXT_MAX = 1 << 20
PIECE_CHARACTERS = 7
"""An answer is tokenized in pieces of about so many, which gives other tokens than the whole."""

console = Console()


class Model(FakeDispatcher):
    """Says what it is told to say next."""

    def __init__(self) -> None:
        super().__init__(lambda request: (), context_max=CONTEXT_MAX)
        self.next: list[int] = []

    async def run(self, request: StepRequest, tell: Tell | None = None) -> AsyncGenerator[Output | Finished, None]:
        usage = StepUsage(prompt_tokens=request.prompt_tokens, output_tokens=len(self.next))

        def script(_: StepRequest) -> Script:
            return [Output(self.next, usage), Finished("stop", usage)]

        self.script = script
        async for event in super().run(request, tell):
            yield event


class Tally(msgspec.Struct):
    """Tokens of answers."""

    said: int = 0
    found: int = 0
    errors: int = 0


def family_text(family: Family, tokenizer: str, templates: Path) -> Text:
    """The default model's tokenizer with a family's special tokens and template."""
    [path] = [path for path in sorted(templates.glob("*.jinja")) if family.template in path.name][:1] or [None]
    if path is None:
        raise FileNotFoundError(f"{templates} has no template of {family.template}")
    own = Tokenizer.from_str(tokenizer)
    texts = [text for text in (family.end, family.begin, *family.specials) if text]
    own.add_special_tokens(texts)
    special = {"bos_token": family.begin, "eos_token": family.end}
    end = own.token_to_id(family.end)
    assert end is not None
    return Text(own, path.read_text(), special, (end,))


def cut(text: Text, said: str, dice: random.Random) -> list[int]:
    """An answer in tokens, not in those that a tokenizer would choose; special ones stay whole."""
    ids: list[int] = []
    at = 0
    while at < len(said):
        end = min(len(said), at + 1 + dice.randrange(2 * PIECE_CHARACTERS))
        bracket = max(said.rfind("[", at, end), said.rfind("<", at, end))
        if bracket > at:
            end = bracket
        elif bracket == at:
            close = min((said.find(c, at) for c in "]>" if said.find(c, at) >= 0), default=end)
            end = max(end, close + 1)
        ids += text.encode(said[at:end])
        at = end
    return ids


async def play(
    http: httpx.AsyncClient,
    model: Model,
    text: Text,
    family: Family,
    conversation: Conversation,
    client: Callable[[Message], Message],
    tally: Tally,
) -> None:
    """One conversation with one client."""
    trace = f"{family.name}-{conversation.name}-{client.__name__}"
    pen, dice = Pen(trace), random.Random(trace)
    messages: list[Any] = [dict(message) for message in conversation.opening]
    before: list[int] = []
    said = 0
    for at, (answer, after) in enumerate(conversation.turns):
        raw = family.write(told(answer, family), pen)
        model.next = [*cut(text, raw, dice), *text.eos_tokens]
        body = {"model": MODEL, "messages": messages, "tools": conversation.tools or None}
        reply = await http.post("/v1/chat/completions", json=body, headers={"x-trace-id": trace})
        if reply.status_code != 200:
            tally.errors += 1
            console.log(f"{trace} turn {at}: {reply.status_code} {reply.text[:300]}")
            return
        prompt = unpack_tokens(model.requests[-1].prompt)
        if at:
            start = len(before) - said
            same = common(prompt, before)
            tally.said += said
            tally.found += max(0, same - start)
        before, said = [*prompt, *model.next[:-1]], len(model.next) - 1
        model.requests.clear()
        message = reply.json()["choices"][0]["message"]
        ids = [call["id"] for call in message.get("tool_calls") or ()]
        messages.append(client(message))
        for follows in after:
            given = {"role": follows["role"], "content": follows["content"]}
            if "call" in follows:
                given["tool_call_id"] = ids[int(follows["call"])] if int(follows["call"]) < len(ids) else "lost"
            messages.append(given)


def told(answer: Answer, family: Family) -> Answer:
    """What this family can say of an answer: some say a text or calls."""
    if answer.calls and family.name.startswith(("llama", "mistral")):
        return Answer("", answer.calls)
    return answer if answer.content or answer.calls else Answer("(nothing)")


def common(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


async def measure(recordings: Path, templates: Path, limit: int) -> list[Result]:
    """All families, all clients, all conversations."""
    conversations = read(recordings, limit)
    tokenizer = Text.load(resolve()).serialized()
    results: list[Result] = []
    total = Tally()
    for family in FAMILIES:
        text = family_text(family, tokenizer, templates)
        whole = Tally()
        for client in CLIENTS:
            tally = Tally()
            model = Model()
            app = create_app(model, {MODEL: text}, lambda: b"", ApiConfig(body_bytes_max=1 << 26), InlineOffload())
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://router", timeout=60) as http:
                for conversation in conversations:
                    await play(http, model, text, family, conversation, client, tally)
            results.append(Result(f"prefix.{family.name}.{client.__name__}", tally.found / max(1, tally.said), "1"))
            for kept in (whole, total):
                kept.said, kept.found, kept.errors = (
                    kept.said + tally.said,
                    kept.found + tally.found,
                    kept.errors + tally.errors,
                )
        results.append(Result(f"prefix.{family.name}", whole.found / max(1, whole.said), "1"))
    results.append(Result("prefix.answers", total.found / max(1, total.said), "1"))
    results.append(Result("prefix.answers.tokens", total.said, "tokens"))
    results.append(Result("prefix.errors", total.errors, "conversations"))
    return results


def main(
    recordings: Annotated[Path, typer.Option(help="Where the recordings are.", envvar="TRACEHAUL_RECORDINGS")],
    templates: Annotated[Path, typer.Option(help="Where the families' chat templates are, as *.jinja.")],
    limit: Annotated[int, typer.Option(help="Conversations of each recording.", min=1)] = 12,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    """Count how much of agents' own answers is found again in their next prompts."""
    results = asyncio.run(measure(recordings, templates, limit))
    finish({"limit": limit}, results, json, console)


if __name__ == "__main__":
    typer.run(main)
