"""Which versions of the messages understand each other. Pure.

The major number grows when a message changes its meaning or must be understood; the minor one when something is added
that the other side may leave unread: a field is ignored by who does not know it, and has a default for who is not sent
it. So what is new is told only to those that know it, and versions of one major number run side by side.
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
WIRE = Version(2, 0)
"""What this software speaks."""


def understands(mine: Version, theirs: Version) -> bool:
    """Whether processes of these versions can be in one cluster."""
    return mine.major == theirs.major
