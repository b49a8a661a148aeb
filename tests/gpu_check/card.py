"""The card that figures belong to, and the rate at which its memory can be read on paper."""

import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "triton", "torchjd", "deepspeed", "diffusers", "peft")


def environment(device: str) -> dict[str, object]:
    """Return what ran, where and when; the card's own facts only for a card."""
    facts: dict[str, object] = {
        "device": device,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        facts |= {
            "card": about.name,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "compute_capability": f"{about.major}.{about.minor}",
            "memory_bytes": about.total_memory,
            "bandwidth_GB_s": memory_rate(about.memory_clock_rate, about.memory_bus_width),
        }
    return facts


def memory_rate(clock_khz: int, bus_bits: int) -> float | None:
    """Return GB/s of memory that moves data twice per clock; None where the driver does not say."""
    return 2 * clock_khz * 1e3 * bus_bits / 8 / 1e9 or None


def _driver() -> str | None:
    """Ask nvidia-smi, which comes with the driver; torch does not know."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
