"""The GPU kernels compile, without a GPU, and stay within limits; all of them by `python -m unlearn_kernels.aot`."""

import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the GPU backend needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter nothing is compiled", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from unlearn_kernels import aot
from unlearn_kernels.triton import combine_, gram, launches, noise_and_target, preconditioned_gram, weighted_loss
from unlearn_kernels.triton.variants import variants

GOOD = aot.Row("sm90", "combine_pair", "K = 2", "bf16", streams=2, registers=32, wide_loads=2)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cached build from an earlier run would prove nothing."""
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm90", "gfx942"])
@pytest.mark.parametrize("kernel", sorted({variant.kernel for variant in variants()}))
def test_every_kernel_is_within_its_limits(target: str, kernel: str) -> None:
    wanted = [variant for variant in variants() if variant.kernel == kernel and variant.dtype != "fp16"]
    assert wanted
    rows = [aot.build(variant, target) for variant in wanted]
    broken = {f"{row.detail} {row.dtype}": aot.broken_limits(row) for row in rows if aot.broken_limits(row)}
    assert not broken


@pytest.mark.parametrize("target", aot.TARGETS)
def test_surgery_builds_for_every_gpu(target: str) -> None:
    """The fast tier builds one variant for each GPU family: the Gram matrix of two bfloat16 gradients."""
    variant = next(v for v in variants() if v.kernel == "gram_pair" and v.dtype == "bf16" and v.streams)
    row = aot.build(variant, target)
    assert aot.broken_limits(row) == []
    assert row.registers > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 73}, "73 registers, at most 72"),
        ({"stack_bytes": 16}, "16 bytes of stack"),
        ({"local_bytes": 8}, "8 bytes of local memory"),
        ({"spills": 3}, "3 spills"),
        ({"wide_loads": 1}, "1 loads of 128 bits, of 2 tensors"),
        ({"error": "does not build: why"}, "does not build: why"),
    ],
)
def test_the_limits_can_break(change: dict[str, int], words: str) -> None:
    assert aot.broken_limits(GOOD) == []
    assert aot.broken_limits(replace(GOOD, **change)) == [words]


def test_gram_may_hold_many_registers_and_what_does_not_stream_needs_no_wide_load() -> None:
    assert aot.broken_limits(replace(GOOD, kernel="gram_pair", registers=200)) == []
    assert aot.broken_limits(replace(GOOD, streams=0, wide_loads=0)) == []


def test_a_kernel_that_does_not_build_is_a_row() -> None:
    variant = next(v for v in variants() if v.kernel == "ordered_sum")
    row = aot.build(replace(variant, constants={"SYMMETRIC": False, "BLOCK": 1000}), "sm90")
    assert row.error is not None
    assert row.error.startswith("does not build: ")


def test_the_command_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["--target", "sm90", "--kernel", "ordered_sum", "--dtype", "fp32"]
    assert aot.main(chosen) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:4] == ["target", "kernel", "variant", "dtype"]
    assert table[1].endswith("ok")
    assert table[-1].endswith("1 builds, 0 outside the limits")
    monkeypatch.setattr(aot, "MOST_REGISTERS", 1)
    assert aot.main([*chosen, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["triton"]
    assert [row["broken"] for row in result["builds"]] == [[f"{result['builds'][0]['registers']} registers, at most 1"]]


class _NoGpu:
    """The parts of a driver that Triton uses before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return aot.TARGETS["sm90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_what_the_launches_ask_for_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads the arguments itself here, and the variants should agree with it. Sizes of 1 are special."""
    built: list[str] = []

    def compile_only(
        kernel: launches.Kernel,
        programs: int,
        on: torch.Tensor,
        arguments: tuple[object, ...],
        constants: launches.Constants,
        *,
        threads: int = launches.THREADS,
    ) -> None:
        options = launches.options(threads, warp_size=32)
        compiled = kernel.warmup(*arguments, grid=(programs,), **constants, **options)  # pyright: ignore[reportAttributeAccessIssue]
        built.append(compiled.name)

    for module in ("launches", "samples", "grams", "preconditioned", "combine"):
        monkeypatch.setattr(importlib.import_module(f"unlearn_kernels.triton.{module}"), "launch", compile_only)
    monkeypatch.setattr(driver, "_active", _NoGpu())
    for shape in ((2, 4, 16), (1, 1)):
        x, table = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape[0], 3)
        noise_and_target(x, x, x, torch.zeros(shape[0], 2), table, with_target=True)
        for mask in (None, torch.zeros(shape[0], shape[-1])):
            weighted_loss(x, [x, x, x], table, torch.zeros(shape[0]), mask, with_gradient=True)
    for count in (1, 2, 3):
        gradients = [[torch.zeros(40), torch.zeros(7)[1:]] for _ in range(count)]
        gram(gradients)
        preconditioned_gram(gradients, [torch.ones(40), torch.ones(7)[1:]], 0.5, 1e-8)
        combine_(gradients[0], gradients, [1.0] * count)
    assert set(built) == {f"{variant.kernel}_kernel" for variant in variants()}
