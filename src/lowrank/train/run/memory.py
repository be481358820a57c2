"""How much memory a training takes."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch


def start_of_peak() -> int:
    """Memory in use now, in bytes; the peak is counted from here on, where the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Linux, with glibc
        # what an evaluation before has freed goes back to the system: it would hide what training takes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _linux_memory("VmRSS") or peak_memory()[0]


def peak_memory() -> tuple[int, str]:
    """The largest memory since `start_of_peak`, in bytes, and of what."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "cuda"
    unit = 1 if sys.platform == "darwin" else 1024
    ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return _linux_memory("VmHWM") or ever, "process"


def _linux_memory(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
