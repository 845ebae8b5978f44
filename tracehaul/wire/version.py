"""Which versions of the messages understand each other. Pure.

The major number grows when a message changes its meaning, or takes a value that it never had; the minor one when a
field is added that the other side may leave unread: it is ignored by who does not know it, and has a default for who is
not sent it. A message that is new is sent only to who knows it. So versions of one major number run side by side.
"""

from typing import NamedTuple


class Version(NamedTuple):
    """Of the messages between processes."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


OLDEST = Version(1, 0)
"""Of a node that says none."""
WIRE = Version(2, 2)
"""What this software speaks."""


def understands(mine: Version, theirs: Version) -> bool:
    """Whether processes of these versions can be in one cluster."""
    return mine.major == theirs.major
