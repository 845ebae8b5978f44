"""What answers are called by what they depend on: a step's prompt and its sampling, whose seed is among it."""

import msgspec
from blake3 import blake3

from tracehaul.wire.ids import BlockHash
from tracehaul.wire.steps import Sampling

NAME_BYTES = 16


def answer_name(root: BlockHash, prompt: bytes, sampling: Sampling) -> bytes:
    """Of what follows a prompt, in wire form, when it is sampled so: answers of one name are one.

    ``root``: of the model's KV layout, salted as the tenant's.
    """
    digest = blake3(msgspec.msgpack.encode((root, sampling, len(prompt))))
    return digest.update(prompt).digest(NAME_BYTES)
