"""What an engine computes on, in words: engines of the same model and words are equally fast."""

import platform
from pathlib import Path

import torch

from tracehaul import __version__
from tracehaul.engine.cpu.compiling import TARGET


def hardware(device: torch.device, threads: int) -> str:
    """Tells apart devices, numbers of threads, processors and versions."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} {TARGET}"
    built = f"{torch.backends.cpu.get_cpu_capability()} {torch.__version__} {__version__}"
    return f"{device} {what} {threads} threads {built}"


def _processor() -> str:
    """Its name, as Linux has it, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
