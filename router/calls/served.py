"""One model as calls see it: its text, and what makes prompts and forms of it."""

from router.calls.forms import Forms
from router.calls.limits import CallLimits
from router.calls.memory import Memory
from router.calls.prompts import Prompts
from router.calls.text import Text
from tracehaul.runtime.offload import Offload


class Served:
    """A model that may be asked for, whether or not a worker of it is ready."""

    def __init__(self, text: Text, name: str, memory: Memory, limits: CallLimits, offload: Offload) -> None:
        self.text = text
        self.prompts = Prompts(text, offload, memory, name)
        self.forms = Forms(text, None if limits.tool_format == "auto" else limits.tool_format)
