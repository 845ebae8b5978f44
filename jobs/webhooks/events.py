"""What can be told, and in which words. Pure."""

from typing import Literal, get_args

import msgspec
from blake3 import blake3

Kind = Literal[
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "response.completed",
    "response.failed",
    "response.cancelled",
    "response.incomplete",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Event(msgspec.Struct, frozen=True):
    """Something has ended."""

    kind: Kind
    tenant: str
    """Whose it was."""
    subject: str
    """Its id."""
    at: int
    """When, in Unix seconds."""

    @property
    def name(self) -> str:
        """The same whenever the same is told: receivers know by it what they were told before."""
        said = msgspec.json.encode((self.kind, self.tenant, self.subject))
        return f"evt_{blake3(said).hexdigest(16)}"

    def body(self) -> str:
        """As it is told, in OpenAI's form: only which one ended, for whoever may ask for it."""
        told = {
            "id": self.name,
            "object": "event",
            "created_at": self.at,
            "type": self.kind,
            "data": {"id": self.subject},
        }
        return msgspec.json.encode(told).decode()


def kind_of(subject: Literal["batch", "response"], status: str) -> Kind | None:
    """What is to be told of one that has that status; None: nothing."""
    name = f"{subject}.{status}"
    return next((kind for kind in KINDS if kind == name), None)
