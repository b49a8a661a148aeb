"""Checks what is installed: Python, packages, kernels, devices, and the weights of the encoders that are set."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from expunge.doctor.check import Check
from expunge.evaluation.encoders import find_encoder
from expunge.settings import Settings

PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "deepspeed", "mlflow", "opencv-python-headless")


def python() -> list[Check]:
    found = platform.python_version()
    return [Check("python", sys.version_info >= (3, 11), found, "install Python 3.11 or newer")]


def packages() -> list[Check]:
    return [_package(name) for name in PACKAGES]


def _package(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, False, "not installed", f"pip install {name}")


def kernels() -> list[Check]:
    """Without the fused kernels plain torch runs: the same results, only slower."""
    try:
        from unlearn_kernels.backends import why_absent
    except ImportError as error:
        hint = "install expunge again: it brings unlearn_kernels along"
        return [Check("unlearn_kernels", False, str(error), hint)]
    rows = [("native", "CPU kernels", "C", "install a C compiler, then expunge again")]
    if _gpus():
        rows.append(("triton", "GPU kernels", "Triton", "install the triton that belongs to this torch"))
    checks = []
    for backend, name, found, hint in rows:
        why = why_absent(backend)
        checks.append(
            Check(name, why is None, found if why is None else f"plain torch runs: {why}", hint, required=False)
        )
    return checks


def devices() -> list[Check]:
    """A machine without a GPU works, only slowly."""
    try:
        names = _gpus()
    except ImportError as error:
        return [Check("devices", False, f"torch cannot be imported ({error})", "pip install torch")]
    return [Check("devices", True, ", ".join(names) or "cpu", required=False)]


def encoders(settings: Settings) -> str:
    return ", ".join(find_encoder(name) for name in settings.evaluation.encoders)


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
