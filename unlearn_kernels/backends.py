"""Which implementation runs: chosen by the tensors' device and dtype, or by the caller.

- `triton` on CUDA and ROCm devices, where triton is installed;
- `native` on the CPU, where the C library was built;
- `reference` everywhere else, and for float64.
"""

import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

NAMES = ("triton", "native", "reference")
FUSED = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that `triton` and `native` take."""

VARIABLE = "UNLEARN_KERNELS_BACKEND"
_DEFAULT = os.environ.get(VARIABLE)
_FORCED: ContextVar[str | None] = ContextVar("unlearn_kernels_backend", default=_DEFAULT)


def gradient_dtype(pred: Tensor) -> torch.dtype:
    """Return the dtype of the loss's gradient before it is scaled: float16 would lose most of an unscaled gradient."""
    return torch.float32 if pred.dtype == torch.float16 else pred.dtype


class Backend(Protocol):
    """The operations of an implementation. Tensors are contiguous and on one device; `ops` states the shapes of tables.

    K gradients are K lists of non-empty tensors. `terms` are 1 to 3 tensors of pred's shape. `mask` is [B, S] and
    repeats along a sample. Without autograd: `weighted_loss` returns the loss and its gradient in `pred`, of
    `gradient_dtype`.
    """

    def noise_and_target(
        self, x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor, *, with_target: bool
    ) -> tuple[Tensor, Tensor | None]: ...

    def weighted_loss(
        self,
        pred: Tensor,
        terms: Sequence[Tensor],
        coefficients: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        *,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]: ...

    def gram(self, gradients: Sequence[Sequence[Tensor]]) -> Tensor: ...

    def preconditioned_gram(
        self, gradients: Sequence[Sequence[Tensor]], second_moment: Sequence[Tensor], correction: float, eps: float
    ) -> Tensor: ...

    def combine_(
        self, out: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], coefficients: Sequence[float]
    ) -> None: ...


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside on backend `name`; it raises ValueError for tensors that the backend does not take.

    Raises ImportError if the backend is not available. The variable UNLEARN_KERNELS_BACKEND, read at import, does the
    same for a whole process.
    """
    _load(name)
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def backend_for(tensors: Sequence[Tensor]) -> Backend:
    """Choose the implementation for these tensors. Raises ValueError if a forced one does not take them."""
    return _load(backend_name(tensors))


def backend_name(tensors: Sequence[Tensor]) -> str:
    """Return the name of the implementation that `backend_for` chooses."""
    device = tensors[0].device.type
    fused = all(tensor.dtype in FUSED for tensor in tensors)
    forced = _FORCED.get()
    if forced:
        if forced != "reference" and not fused:
            raise ValueError(f"the {forced} backend takes float32, bfloat16 and float16 only")
        if forced == "native" and device != "cpu":
            raise ValueError(f"the native backend takes tensors on the CPU, not on {device}")
        if forced == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "the triton backend takes tensors on a GPU, or any in its interpreter (TRITON_INTERPRET=1)"
            )
        return forced
    preferred = {"cuda": "triton", "cpu": "native"}.get(device)
    return preferred if fused and preferred and why_absent(preferred) is None else "reference"


@cache
def why_absent(name: str) -> str | None:
    """Say why a backend cannot run in this process, or return None if it can."""
    try:
        _load(name)
    except (ImportError, ValueError) as error:
        return str(error)
    return None


@cache
def _load(name: str) -> Backend:
    if name not in NAMES:
        raise ValueError(f"backend: {name!r}, expected one of {', '.join(NAMES)}")
    module = import_module(f"unlearn_kernels.{name}")
    if name == "native":
        module.library()
    elif name == "triton":
        # Triton itself would only find out at the first launch, in the middle of a training.
        if not any(map(shutil.which, [os.environ.get("CC", "gcc"), "gcc", "clang"])):
            raise ImportError("Triton compiles its launchers with a C compiler, and there is no gcc or clang here")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise ImportError("Triton compiles its launchers against Python.h, which is not here: install python3-dev")
    return cast(Backend, module)
