"""All that differs between a CPU and a CUDA device: clock, memory, peak speed.

CPU times are CPU seconds of the process, so that other work on the machine does not count; CUDA
times are wall seconds between two moments at which the device has finished.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import psutil
import torch

from theory.cli import UserError

PEAK_TFLOPS = {"H200": 989.4, "H100": 989.4}
"""Dense bfloat16 by name, SXM (NVIDIA's data sheets); other devices are measured."""
_OTHERWISE = ("PCIe", "NVL", "MIG")
"""Slower variants under the same name."""


def find_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here")
    return torch.device(name)


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def now(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def used_mib(device: torch.device) -> float:
    """Memory of this process at the moment: resident, or allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def peak_mib(device: torch.device) -> float:
    """Most memory of the whole life of this process: resident, or allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss would begin at the peak of the parent process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def peak_tflops(device: torch.device, given: float | None = None) -> tuple[float, str]:
    """(dense matrix speed in TFLOP/s, where the number comes from)."""
    if given is not None:
        return given, "given"
    name = describe(device)
    for known, tflops in PEAK_TFLOPS.items():
        if known in name and not any(word in name for word in _OTHERWISE):
            return tflops, f"data sheet of {known}"
    return _measured_tflops(device), "best of ten matrix products"


def _measured_tflops(device: torch.device) -> float:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        begin = now(device)
        a @ a
        best = min(best, now(device) - begin)
    return 2 * size**3 / best / 1e12
