"""The C kernels of `csrc`, called through their C ABI: the CPU's backend. Arguments arrive checked, see `ops`.

float32, bfloat16 and float16, mixed at will; arithmetic in float32 registers, sums in float64, the same bits for any
number of threads. `torch.get_num_threads()` threads are used. The calls release the GIL.
"""

import ctypes
import itertools
import math
import sysconfig
from collections.abc import Iterable, Sequence
from ctypes import c_double, c_float, c_int, c_int64, c_uint8, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from unlearn_kernels.backends import gradient_dtype

LIBRARY = Path(__file__).with_name("libunlearn_kernels" + (sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"))
ABI = 3
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def library() -> ctypes.CDLL:
    """Load the compiled library. Raises ImportError with the reason if it was not built or does not load."""
    if not LIBRARY.exists():
        raise ImportError(f"{LIBRARY.name} was not built: there was no C compiler when unlearn_kernels was installed")
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        abi = loaded.unlearn_abi()
    except (OSError, AttributeError) as error:
        raise ImportError(f"{LIBRARY.name} does not load: {error}") from error
    if abi != ABI:
        raise ImportError(f"{LIBRARY.name} is of another version (ABI {abi}, wanted {ABI}): install again")
    pointer, integer = c_void_p, c_int64
    loaded.unlearn_gram.argtypes = [integer, integer, *[pointer] * 3, c_int, pointer]
    loaded.unlearn_preconditioned_gram.argtypes = [integer, integer, *[pointer] * 3, c_float, c_float, c_int, pointer]
    loaded.unlearn_combine.argtypes = [integer, integer, *[pointer] * 6, c_int]
    loaded.unlearn_noise_and_target.argtypes = [integer, integer, *[pointer] * 4, c_int, pointer, pointer, c_int]
    loaded.unlearn_weighted_loss.argtypes = [
        *(integer, integer, c_int, pointer),
        *(c_int, pointer, pointer, pointer),
        *(pointer, pointer, integer),
        *(c_int, pointer, c_int, pointer),
    ]
    return loaded


def noise_and_target(
    x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor, *, with_target: bool
) -> tuple[Tensor, Tensor | None]:
    x_t = torch.empty_like(x_f)
    target = torch.empty_like(x_f) if with_target else None
    status = library().unlearn_noise_and_target(
        len(x_f),
        x_f.numel() // max(1, len(x_f)),
        _pointers([eps, x_f, x_s]),
        _types([eps, x_f, x_s]),
        path.data_ptr(),
        coefficients.data_ptr(),
        TYPES[x_f.dtype],
        x_t.data_ptr(),
        target.data_ptr() if target is not None else None,
        torch.get_num_threads(),
    )
    _check(status)
    return x_t, target


def weighted_loss(
    pred: Tensor,
    terms: Sequence[Tensor],
    coefficients: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    gradient = torch.empty_like(pred, dtype=gradient_dtype(pred)) if with_gradient else None
    loss = c_double()
    status = library().unlearn_weighted_loss(
        len(pred),
        pred.numel() // len(pred),
        TYPES[pred.dtype],
        pred.data_ptr(),
        len(terms),
        _pointers(terms),
        _types(terms),
        coefficients.data_ptr(),
        weight.data_ptr(),
        mask.data_ptr() if mask is not None else None,
        mask.shape[1] if mask is not None else 0,
        torch.get_num_threads(),
        ctypes.byref(loss),
        TYPES[gradient_dtype(pred)],
        gradient.data_ptr() if gradient is not None else None,
    )
    _check(status)
    return torch.tensor(loss.value, dtype=torch.float32, device="cpu"), gradient


def gram(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    result = torch.empty(len(gradients), len(gradients), dtype=torch.float64, device="cpu")
    tensors = [tensor for entry in zip(*gradients, strict=True) for tensor in entry]
    status = library().unlearn_gram(
        len(gradients[0]),
        len(gradients),
        _pointers(tensors),
        _types(tensors),
        _starts(gradients[0]),
        torch.get_num_threads(),
        result.data_ptr(),
    )
    _check(status)
    return result


def preconditioned_gram(
    gradients: Sequence[Sequence[Tensor]], second_moment: Sequence[Tensor], correction: float, eps: float
) -> Tensor:
    result = torch.empty(2, len(gradients), len(gradients), dtype=torch.float64, device="cpu")
    tensors = [tensor for entry in zip(*gradients, second_moment, strict=True) for tensor in entry]
    status = library().unlearn_preconditioned_gram(
        len(second_moment),
        len(gradients),
        _pointers(tensors),
        _types(tensors),
        _starts(second_moment),
        correction**-0.5,
        eps,
        torch.get_num_threads(),
        result.data_ptr(),
    )
    _check(status)
    return result


def combine_(out: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], coefficients: Sequence[float]) -> None:
    tensors = [tensor for entry in zip(*gradients, strict=True) for tensor in entry]
    status = library().unlearn_combine(
        len(out),
        len(gradients),
        _pointers(out),
        _types(out),
        _pointers(tensors),
        _types(tensors),
        _starts(out),
        # Every NaN becomes Python's, as rounding to bfloat16 could lose the bits of another one.
        (c_float * len(coefficients))(*(c if c == c else math.nan for c in coefficients)),
        torch.get_num_threads(),
    )
    _check(status)


def _pointers(tensors: Sequence[Tensor]) -> "ctypes.Array[c_void_p]":
    return (c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _types(tensors: Sequence[Tensor]) -> "ctypes.Array[c_uint8]":
    return (c_uint8 * len(tensors))(*[TYPES[tensor.dtype] for tensor in tensors])


def _starts(entries: Iterable[Tensor]) -> "ctypes.Array[c_int64]":
    starts = [0, *itertools.accumulate(entry.numel() for entry in entries)]
    return (c_int64 * len(starts))(*starts)


def _check(status: int) -> None:
    if status:
        raise MemoryError("unlearn_kernels: no memory for the scratch of a kernel")
