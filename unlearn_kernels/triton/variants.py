"""Every build of the kernels that launches can request; for mixed dtypes, one mixture of each kind.

Left out: what Triton makes of a size that is 1 or beyond 32 bits. "ragged": 16 does not divide a sample, and the mask
is one number per sample. "unaligned": a view that does not begin at a multiple of 16 bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import triton.language as tl

from unlearn_kernels.triton import combine, grams, preconditioned, samples
from unlearn_kernels.triton.launches import THREADS, Constants, Kernel, ordered_sum_kernel, sum_constants

DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
MIXED = "bf16+fp32"
TERMS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Variant:
    kernel: str
    detail: str
    dtype: str
    function: Kernel
    types: Mapping[str, str | tuple[str, ...]]
    """The arguments' types in Triton's notation: "i32", or "*bf16" for a pointer. Pointers are 16-byte aligned."""
    constants: Constants
    """Compile-time arguments; one that is also in `types` gets its value from here."""
    multiples_of_16: tuple[str, ...] = ()
    streams: int
    """The number of tensors that must be loaded 128 bits at a time: those that are read at the speed of memory."""
    threads: int = THREADS


def variants() -> Iterator[Variant]:
    for dtype in (*DTYPES, MIXED):
        for with_target, ragged in ((True, False), (False, False), (True, True)):
            yield _noise(dtype, with_target, ragged)
        for terms in TERMS:
            for masked, with_gradient in ((False, False), (False, True), (True, False), (True, True)):
                yield _loss(dtype, terms, masked, with_gradient, ragged=False)
        yield _loss(dtype, TERMS[-1], masked=True, with_gradient=True, ragged=True)
        for aligned in (True, False):
            yield _gram_pair(dtype, aligned)
            yield _preconditioned_pair(dtype, aligned)
            if dtype != MIXED:
                yield from _gram_tiles(dtype, aligned)
                yield from _preconditioned_tiles(dtype, aligned)
            yield _combine_pair(dtype, aligned)
            yield _combine_many(dtype, aligned)
    yield _sum("gram", "fp64", "fp64")
    yield _sum("loss", "fp64", "fp32")
    yield _sum("mask", "fp32", "fp64")


def _noise(dtype: str, with_target: bool, ragged: bool) -> Variant:
    own, other = _pair(dtype)
    types = dict.fromkeys(("x_f", "x_t", "target"), f"*{own}") | dict.fromkeys(("x_s", "eps"), f"*{other}")
    types |= {"path": "*fp32", "coefficients": "*fp32", "size": "i32", "blocks": "i32"}
    absent = {} if with_target else {"target": None}
    return Variant(
        kernel="noise_and_target",
        detail=_words("" if with_target else "no target", "ragged" if ragged else ""),
        dtype=dtype,
        function=samples.noise_and_target_kernel,
        types=types,
        constants={**samples.noise_constants(with_target=with_target), **absent},
        multiples_of_16=() if ragged else ("size",),
        streams=0 if ragged else 2 + with_target,
    )


def _loss(dtype: str, terms: int, masked: bool, with_gradient: bool, ragged: bool) -> Variant:
    own, other = _pair(dtype)
    types = {
        **{"pred": f"*{own}", "terms": (f"*{other}",) * terms, "partials": "*fp64"},
        "gradient": "*fp32" if own == "fp16" else f"*{own}",
        **{"coefficients": "*fp32", "weight": "*fp32", "mask": "*fp32", "mask_sums": "*fp64"},
        **{"size": "i32", "blocks": "i32", "plane": "i32", "scale": "fp32"},
    }
    fixed = {
        **({} if masked else {"mask": None, "mask_sums": None}),
        **({} if with_gradient else {"gradient": None}),
        **({"plane": 1} if ragged else {}),
    }
    options = ["mask" if masked else "", "" if with_gradient else "no gradient", "ragged" if ragged else ""]
    return Variant(
        kernel="weighted_loss",
        detail=_words(f"{terms} terms", *options),
        dtype=dtype,
        function=samples.weighted_loss_kernel,
        types=types,
        constants={**samples.loss_constants(with_gradient=with_gradient, masked=masked), **fixed},
        multiples_of_16=() if ragged else ("size", "plane"),
        streams=0 if ragged else 1 + terms + masked,
    )


_GRAM_TYPES = {"table": "*i64", "partials": "*fp64", **dict.fromkeys(grams.UNSPECIALISED, "i32")}


def _gram_pair(dtype: str, aligned: bool) -> Variant:
    x, y = (DTYPES[name] for name in _pair(dtype))
    return Variant(
        kernel="gram_pair",
        detail=_words("K <= 2", "" if aligned else "unaligned"),
        dtype=dtype,
        function=grams.gram_pair_kernel,
        types=_GRAM_TYPES,
        constants=grams.pair_constants(x, y, aligned=aligned),
        streams=2 if aligned else 0,
    )


def _tiles() -> Iterator[tuple[int, bool, str]]:
    """Yield the size of each tile, whether it is on the diagonal, and when it is used."""
    small, large = grams.TILES
    yield small, True, f"K <= {small}"
    yield large, True, f"K <= {large}"
    yield large, False, f"K > {large}"


def _gram_tiles(dtype: str, aligned: bool) -> Iterator[Variant]:
    for tile, diagonal, detail in _tiles():
        yield Variant(
            kernel="gram_tile",
            detail=_words(detail, "" if aligned else "unaligned"),
            dtype=dtype,
            function=grams.gram_tile_kernel,
            types=_GRAM_TYPES,
            constants=grams.tile_constants(DTYPES[dtype], tile, diagonal=diagonal, aligned=aligned),
            streams=0 if not aligned else 1 if diagonal else 2,
            threads=grams.tile_threads(tile),
        )


_PRECONDITIONED_TYPES = {**_GRAM_TYPES, "scale": "fp32", "eps": "fp32"}


def _preconditioned_pair(dtype: str, aligned: bool) -> Variant:
    """Change the one of `gram`: the second moment is one more stream."""
    return replace(
        _gram_pair(dtype, aligned),
        kernel="preconditioned_pair",
        function=preconditioned.preconditioned_pair_kernel,
        types=_PRECONDITIONED_TYPES,
        streams=3 if aligned else 0,
    )


def _preconditioned_tiles(dtype: str, aligned: bool) -> Iterator[Variant]:
    for tile, diagonal, detail in _tiles():
        yield Variant(
            kernel="preconditioned_tile",
            detail=_words(detail, "" if aligned else "unaligned"),
            dtype=dtype,
            function=preconditioned.preconditioned_tile_kernel,
            types=_PRECONDITIONED_TYPES,
            constants=preconditioned.tile_constants(DTYPES[dtype], tile, diagonal=diagonal, aligned=aligned),
            streams=0 if not aligned else 2 if diagonal else 3,
            threads=preconditioned.tile_threads(DTYPES[dtype], tile, aligned=aligned),
        )


def _combine_pair(dtype: str, aligned: bool) -> Variant:
    x, y = (DTYPES[name] for name in _pair(dtype))
    return Variant(
        kernel="combine_pair",
        detail=_words("K = 2", "" if aligned else "unaligned"),
        dtype=dtype,
        function=combine.combine_pair_kernel,
        types={"table": "*i64", "entries": "i32"},
        constants=combine.pair_constants(x, y, y, aligned=aligned),
        streams=2 if aligned else 0,
    )


def _combine_many(dtype: str, aligned: bool) -> Variant:
    x, y = (DTYPES[name] for name in _pair(dtype))
    return Variant(
        kernel="combine_many",
        detail=_words("any K", "" if aligned else "unaligned"),
        dtype=dtype,
        function=combine.combine_many_kernel,
        types={"table": "*i64", "entries": "i32", "count": "i32"},
        constants=combine.many_constants([x, y], y, aligned=aligned),
        # Mixed dtypes need a load for each dtype that a gradient may have.
        streams=0 if not aligned else 1 if x == y else len(DTYPES),
    )


def _sum(detail: str, values: str, sums: str) -> Variant:
    """Build `ordered_sum`: partial sums are few; a mask is data, and its plane a multiple of 16."""
    streams = detail == "mask"
    return Variant(
        kernel="ordered_sum",
        detail=detail,
        dtype=values,
        function=ordered_sum_kernel,
        types={"values": f"*{values}", "sums": f"*{sums}", "size": "i32", "count": "i32"},
        constants=sum_constants(symmetric=detail == "gram"),
        multiples_of_16=("size",) if streams else (),
        streams=int(streams),
    )


def _pair(dtype: str) -> tuple[str, str]:
    first, _, second = dtype.partition("+")
    return first, second or first


def _words(*words: str) -> str:
    return ", ".join(word for word in words if word)
