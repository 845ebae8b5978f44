"""How models of several families write an answer. Pure.

No weights are needed: an answer is written by rule in a family's format, in a spelling that the family's template would
not choose itself.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec

from bench.prefix.conversations import Answer, Called

THOUGHT = "The next step follows from what was said: look first, then act, and say what was done."


class Family(msgspec.Struct, frozen=True):
    """One family."""

    name: str
    template: str
    """Part of the name of its template's file."""
    end: str
    """Ends a turn."""
    begin: str
    """Begins a text."""
    specials: tuple[str, ...]
    """Its other special tokens."""
    write: Callable[[Answer, "Pen"], str]
    thinks: bool = False


class Pen:
    """Spells JSON as no template does: without spaces, indented, with escapes; another way each time."""

    def __init__(self, seed: str) -> None:
        self._dice = random.Random(seed)

    def json(self, value: Any) -> str:
        """JSON text of a value."""
        style = self._dice.randrange(4)
        if style == 0:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        if style == 1:
            return json.dumps(value, ensure_ascii=False, indent=2)
        if style == 2:
            return json.dumps(value, ensure_ascii=True)
        return json.dumps(value, ensure_ascii=False, separators=(" , ", ": "))

    def id(self) -> str:
        """Of a call, of nine letters and digits."""
        return "".join(self._dice.choices("abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=9))


def _hermes(answer: Answer, pen: Pen) -> str:
    calls = [
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {pen.json(call.arguments)}}}\n</tool_call>'
        for call in answer.calls
    ]
    return "\n".join([answer.content, *calls] if answer.content else calls)


def _thinking(answer: Answer, pen: Pen) -> str:
    return f"<think>\n{THOUGHT}\n</think>\n\n{_hermes(answer, pen)}"


def _llama3(answer: Answer, pen: Pen) -> str:
    if not answer.calls:
        return answer.content
    return "; ".join(f'{{"name": "{call.name}", "parameters": {pen.json(call.arguments)}}}' for call in answer.calls)


def _nemo(answer: Answer, pen: Pen) -> str:
    if not answer.calls:
        return answer.content

    def one(call: Called) -> str:
        return f'{{"name": "{call.name}", "arguments": {pen.json(call.arguments)}, "id": "{pen.id()}"}}'

    return "[TOOL_CALLS][" + ", ".join(map(one, answer.calls)) + "]"


def _small(answer: Answer, pen: Pen) -> str:
    if not answer.calls:
        return answer.content
    return "".join(
        f"[TOOL_CALLS]{call.name}[CALL_ID]{pen.id()}[ARGS]{pen.json(call.arguments)}" for call in answer.calls
    )


_CHATML = ("<|im_start|>",)
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>")
_MISTRAL = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]",
)  # fmt: skip
FAMILIES = (
    Family("qwen2.5", "Qwen2.5", "<|im_end|>", "", _CHATML, _hermes),
    Family("qwen3", "Qwen3-0.6B", "<|im_end|>", "", _CHATML, _thinking, thinks=True),
    Family("llama3.1", "Llama-3.1-8B-Instruct", "<|eot_id|>", "<|begin_of_text|>", _HEADERS, _llama3),
    Family("llama3.2", "Llama-3.2", "<|eot_id|>", "<|begin_of_text|>", _HEADERS, _llama3),
    Family("mistral-nemo", "Mistral-Nemo", "</s>", "<s>", _MISTRAL, _nemo),
    Family("mistral-small", "Mistral-Small", "</s>", "<s>", _MISTRAL, _small),
    Family("hermes3", "Hermes-3", "<|im_end|>", "<|begin_of_text|>", _CHATML, _hermes),
    Family("smollm3", "SmolLM3", "<|im_end|>", "", _CHATML, _thinking, thinks=True),
)
