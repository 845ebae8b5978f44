"""What registering memory gives, whatever the transport."""

from tracehaul.wire.blocks import RegionDescriptor


class Registered:
    """The :class:`.base.Region` of every transport: bytes of this process, and how peers reach them."""

    def __init__(self, buffer: memoryview, descriptor: RegionDescriptor) -> None:
        self._buffer = buffer
        self._descriptor = descriptor

    @property
    def buffer(self) -> memoryview:
        return self._buffer

    @property
    def descriptor(self) -> RegionDescriptor:
        return self._descriptor
