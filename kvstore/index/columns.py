"""Slots as an index into numpy's view of a column."""

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def column(slots: Sequence[int]) -> NDArray[np.uint32]:
    """``slots`` as an array; several times faster than numpy's own way from a list."""
    return np.frombuffer(array("I", slots), dtype=np.uint32)
