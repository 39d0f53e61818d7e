"""Name the device that times are taken on, and read its clock where the system shows it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Name the processor, with the number of cores this process may use: two tables of one name are comparable."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()} ({cores} cores)"


def processor_of(device: str) -> str:
    """Return a device's name without the number of cores.

    >>> processor_of("some CPU family 25 model 17 (2 cores)")
    'some CPU family 25 model 17'
    """
    return re.sub(r" \(\d+ cores\)$", "", device)


def _cpu_model() -> str:
    if _CPUINFO.is_file():
        fields = dict(
            re.findall(r"^([^\t:]+?)\s*:\s*(.+)$", _CPUINFO.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        )
        # Virtual machines shorten the model name ("AMD EPYC"); family and model number still tell generations apart.
        numbers = (
            f" family {fields['cpu family']} model {fields['model']}"
            if {"cpu family", "model"} <= fields.keys()
            else ""
        )
        if "model name" in fields:
            return f"{' '.join(fields['model name'].split())}{numbers}"
    if sys.platform == "darwin":
        answer = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip()
    return platform.processor() or platform.machine()


def cpu_clock_mhz() -> float | None:
    """Return the mean clock of the processor's cores at this moment, in MHz; none where the system does not show it.

    A virtual machine shows the nominal clock of its host, which says nothing about boost or throttling.
    """
    files = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    clocks = [float(path.read_text(encoding="ascii")) / 1000 for path in files]
    if not clocks and _CPUINFO.is_file():
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
        clocks = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", text, re.MULTILINE)]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def run_queue_wait_ms() -> float | None:
    """Return for how long threads of this process have stood ready without getting a processor, in milliseconds.

    The difference around a call says whether other processes slowed it down. Linux only; elsewhere none.
    """
    waited = 0
    try:
        for path in Path("/proc/self/task").glob("*/schedstat"):
            waited += int(path.read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):  # a thread that has just ended, or a kernel without these statistics
        return None
    return waited / 1e6


def gpu_clock_mhz(uuid: str) -> float | None:
    """Return the clock of a GPU's multiprocessors at this moment, in MHz; none where ``nvidia-smi`` does not say.

    Args:
        uuid: The GPU's own identifier, with or without ``GPU-`` before it. Numbers would not do: CUDA counts the
            devices of ``CUDA_VISIBLE_DEVICES``, the fastest first, ``nvidia-smi`` all of them as they are plugged in.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    identifier = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    answer = subprocess.run(
        [program, f"--id={identifier}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return float(answer.stdout.strip())
    except ValueError:
        return None


def cuda_clock_mhz() -> float | None:
    """Return the clock of PyTorch's first CUDA device; see `gpu_clock_mhz`."""
    import torch

    return gpu_clock_mhz(str(torch.cuda.get_device_properties(0).uuid))
