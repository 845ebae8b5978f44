"""A recording's prompts as token ids, and as text: functions of the names in it. Pure."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bench.replay.recording import COMMON, Blocks, Prompt

TOKEN_MIN, TOKEN_MAX = 100, 49_000
"""Ids used: ordinary ones in any vocabulary of today's models."""
BLOCKS_CACHED = 1 << 16
_COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city"
)
WORDS = _COMMON_WORDS.split()


@lru_cache(maxsize=BLOCKS_CACHED)
def block_tokens(salt: str, scope: str, name: str, count: int) -> NDArray[np.uint32]:
    """``[count]`` token ids that (salt, scope, name) decide."""
    raw = hashlib.shake_128(f"{salt}/{scope}/{name}".encode()).digest(4 * count)
    return TOKEN_MIN + np.frombuffer(raw, "<u4") % (TOKEN_MAX - TOKEN_MIN)


def prompt_tokens(prompt: Blocks, salt: str) -> NDArray[np.uint32]:
    """``[prompt.tokens]`` token ids. Another salt gives other tokens throughout: nothing of another run is found."""
    parts: list[NDArray[np.uint32]] = []
    for place, name in enumerate(prompt.ids):
        if place < prompt.common_blocks:
            parts.append(block_tokens(salt, f"{COMMON}/{prompt.kind}", str(place), prompt.block_tokens))
        else:
            parts.append(block_tokens(salt, prompt.scope, str(name), prompt.block_tokens))
    missing = prompt.tokens - len(prompt.ids) * prompt.block_tokens
    if missing > 0:
        parts.append(block_tokens(salt, prompt.scope, f"after {prompt.ids[-1:]}", missing))
    return np.concatenate(parts)[: prompt.tokens]


def prompt_text(tokens: NDArray[np.uint32]) -> str:
    """One common word per token id: about as many tokens again, in any tokenizer."""
    return " ".join(WORDS[token % len(WORDS)] for token in tokens.tolist())


def packed_prompt(prompt: Prompt, salt: str) -> bytes:
    """A prompt in the wire form of tokens; of messages, each four bytes of text count as one token."""
    if isinstance(prompt, Blocks):
        return prompt_tokens(prompt, salt).astype("<u4").tobytes()
    text = "".join(f"<{message['role']}>{message['content']}" for message in prompt.messages).encode()
    return text[: len(text) // 4 * 4]
