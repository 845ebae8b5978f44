"""Distinct things have distinct types: ids never mix."""

from typing import NewType

TraceId = NewType("TraceId", str)
"""One agent task: a tree of steps."""

StepId = NewType("StepId", str)
"""One model call inside a trace; unique in the cluster."""

NodeId = NewType("NodeId", str)
"""A process's stable name, such as ``decode-0``. It survives restarts; the generation does not."""

Generation = NewType("Generation", int)
"""Tells the lives of one name apart: random, equal to no other, in no order."""

Epoch = NewType("Epoch", int)
"""Orders the lives of one name; issued by a router to a life that joins for the first time. 0: none was yet."""

BlockHash = NewType("BlockHash", bytes)
"""16 bytes: a block's identity (see :mod:`tracehaul.wire.hashing`)."""

LeaseId = NewType("LeaseId", int)
"""Names one lease at the store node that granted it."""

SlotGeneration = NewType("SlotGeneration", int)
"""Counts the uses of one arena slot; a publish with an older one is fenced."""

Checksum = NewType("Checksum", int)
"""xxh3-64 of a block's bytes."""
