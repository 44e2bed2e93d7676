"""What a run ran on: device, versions, commit, memory."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import elasticzo
from experiments.train.config import MAX_THREADS

PACKAGES = ("torch", "triton", "numpy", "numba")


def versions() -> dict[str, str]:
    """Versions of Python, of this library, and of the packages whose arithmetic a run uses."""
    found = {"python": platform.python_version(), "elasticzo": elasticzo.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> str:
    """The device in words: GPU model, or processor model and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def machine(device: torch.device) -> dict[str, str]:
    """What the last bits of floats depend on besides versions: the device, and on a CPU the
    instructions that torch's kernels use (ATEN_CPU_CAPABILITY)."""
    found = {"hardware": hardware(device)}
    if device.type == "cpu":
        found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return found


def made_on(device: torch.device) -> dict[str, Any]:
    """What a result was made on and by."""
    return {"hardware": hardware(device), "versions": versions(), "commit": commit()}


def use_threads(count: int) -> None:
    """Threads of torch on the CPU.

    Raises: ValueError unless they are in [1, 1024].
    """
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"threads must be in [1, {MAX_THREADS}], got {count}")
    torch.set_num_threads(count)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this checkout, with "+changes" where files differ from it; None without git."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak memory so far in bytes, and which measure it is."""
    if device.type == "cuda":
        return {
            "bytes": torch.cuda.max_memory_allocated(device),
            "measure": "torch.cuda.max_memory_allocated",
        }
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": peak, "measure": "ru_maxrss of the whole process"}
