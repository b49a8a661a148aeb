"""What the results of each arm come to, with intervals, and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
from scipy.stats import binomtest, bootstrap

from expunge.bench.arms import ARMS
from expunge.bench.results import ArmResult, RequestResult

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """So many of so many, with Wilson's interval."""

    hits: int
    total: int

    @property
    def interval(self) -> tuple[float, float] | None:
        if not self.total:
            return None
        found = binomtest(self.hits, self.total).proportion_ci(CONFIDENCE, method="wilson")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Mean:
    """A mean, with the bootstrap's interval; without one below two different values."""

    value: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean | None":
        """Return None without values. The same values always give the same interval."""
        if not values:
            return None
        if len(set(values)) < 2:
            return cls(fmean(values), None)
        # The percentile interval: BCa, scipy's default, is not defined for every sample of two or three.
        found = bootstrap(
            (np.array(values),), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        return cls(fmean(values), (float(found.low), float(found.high)))


@dataclass(frozen=True)
class Row:
    """One arm."""

    arm: str
    groups: int
    not_reproduced: int
    """Requests that the base model does not reproduce, or that could not be prepared: they are in no other figure."""
    removed: Share
    """As a night counts: the request's rules and integrity."""
    gone: Share
    """By the request's own rules, integrity aside."""
    left: Mean | None
    """Excess ratio in the worst condition, over the requests."""
    psnr: Mean | None
    """Median PSNR of unrelated outputs in dB, over the groups."""
    ssim: Mean | None
    collateral: Mean | None
    """PSNR in dB of the worst tenth of the outputs most like a target, over the groups."""
    withstood: Share
    """Attacks, of those on requests that passed the other rules."""
    steps: float
    passes: float
    seconds: float
    diverged: int

    @classmethod
    def of(cls, results: Sequence[ArmResult]) -> "Row":
        """Summarise the results of one arm, at least one."""
        requests = [request for result in results for request in result.requests]
        judged = [request for request in requests if request.verdict in ("passed", "failed")]
        attacks = [held for request in judged for held in request.attacks.values()]
        return cls(
            arm=results[0].arm,
            groups=len(results),
            not_reproduced=len(requests) - len(judged),
            removed=Share(sum(request.removed for request in judged), len(judged)),
            gone=Share(sum(map(_gone, judged)), len(judged)),
            left=Mean.of([request.left for request in judged if request.left is not None]),
            psnr=Mean.of([result.psnr for result in results if result.psnr is not None]),
            ssim=Mean.of([result.ssim for result in results if result.ssim is not None]),
            collateral=Mean.of([result.collateral for result in results if result.collateral is not None]),
            withstood=Share(sum(attacks), len(attacks)),
            steps=median(result.steps for result in results),
            passes=median(result.passes for result in results),
            seconds=median(result.seconds for result in results),
            diverged=sum(result.diverged for result in results),
        )


def summarise(results: Sequence[ArmResult]) -> list[Row]:
    """Return a row per arm that has results, in the order of ARMS."""
    return [Row.of(mine) for arm in ARMS if (mine := [result for result in results if result.arm == arm])]


COLUMNS = (
    "arm",
    "removed",
    "gone by its own rules",
    "excess left",
    "PSNR, dB",
    "SSIM",
    "collateral, dB",
    "attacks withstood",
    "steps",
    "passes",
    "minutes",
)


def cells(row: Row) -> tuple[str, ...]:
    """Return the row's figures as text, as COLUMNS names them; intervals are in brackets."""
    notes = [f"{row.diverged} diverged"] if row.diverged else []
    notes += [f"{row.not_reproduced} not judged"] if row.not_reproduced else []
    return (
        ARMS[row.arm].title + (f" ({', '.join(notes)})" if notes else ""),
        _share(row.removed),
        _share(row.gone),
        _mean(row.left, 2),
        _mean(row.psnr, 1),
        _mean(row.ssim, 2),
        _mean(row.collateral, 1),
        f"{row.withstood.hits} of {row.withstood.total}" if row.withstood.total else "-",
        f"{row.steps:,.0f}",
        f"{row.passes:,.0f}",
        f"{row.seconds / 60:.1f}",
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _gone(request: RequestResult) -> bool:
    return request.verdict == "passed"


def _share(share: Share) -> str:
    if share.interval is None:
        return "-"
    low, high = share.interval
    return f"{share.hits} of {share.total} ({low:.0%} to {high:.0%})"


def _mean(mean: Mean | None, digits: int) -> str:
    if mean is None:
        return "-"
    if mean.interval is None:
        return f"{mean.value:.{digits}f}"
    low, high = mean.interval
    return f"{mean.value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
