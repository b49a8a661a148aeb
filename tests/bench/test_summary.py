"""The table and the plots of results that are given."""

import xml.etree.ElementTree as ElementTree
from io import BytesIO

import pytest
from PIL import Image

from expunge.bench.plot import pareto
from expunge.bench.results import ArmResult, RequestResult
from expunge.bench.summary import COLUMNS, Mean, Share, as_markdown, cells, summarise


def request(
    verdict: str, left: float | None, *, removed: bool = False, attacks: dict[str, bool] | None = None
) -> RequestResult:
    return RequestResult(
        request="faces-1", verdict=verdict, removed=removed, left=left, bound=left, failed=(), attacks=attacks or {}
    )


def result(arm: str, group: int, *requests: RequestResult, psnr: float = 30.0, **changed: object) -> ArmResult:
    given = {
        "arm": arm,
        "group": group,
        "requests": requests,
        "psnr": psnr,
        "ssim": 0.9,
        "psnr_p05": 20.0,
        "collateral": 25.0,
        "intact": True,
        "steps": 10,
        "passes": 1600,
        "diverged": False,
        "seconds": 90.0,
        **changed,
    }
    return ArmResult.model_validate(given)


GIVEN = [
    result("ours", 0, request("passed", 0.2, removed=True, attacks={"a": True, "b": False}), request("failed", 0.6)),
    result("ours", 1, request("passed", 0.4), request("not_reproduced", None), psnr=34.0, seconds=150.0),
    result("no-op", 0, request("failed", 1.0), request("failed", 1.0), psnr=100.0, steps=0, passes=0),
]


def test_rows_are_in_the_order_of_the_arms_and_count_only_what_was_judged() -> None:
    none, ours = summarise(GIVEN)
    assert (none.arm, ours.arm) == ("no-op", "ours")
    assert ours.removed == Share(1, 3)
    assert ours.gone == Share(2, 3)
    assert ours.not_reproduced == 1
    assert ours.left is not None
    assert ours.left.value == pytest.approx(0.4)
    assert ours.psnr is not None
    assert ours.psnr.value == 32.0
    assert ours.withstood == Share(1, 2)
    assert (none.removed.hits, none.steps, ours.seconds) == (0, 0, 120.0)


def test_a_share_has_wilson_s_interval() -> None:
    assert Share(9, 10).interval == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert Share(0, 0).interval is None


def test_a_mean_has_a_bootstrap_interval_and_none_where_nothing_varies() -> None:
    found = Mean.of([0.0, 1.0] * 50)
    assert found is not None
    assert found.interval is not None
    low, high = found.interval
    assert low == pytest.approx(0.40, abs=0.03)
    assert high == pytest.approx(0.60, abs=0.03)
    assert found == Mean.of([0.0, 1.0] * 50)
    assert Mean.of([0.5, 0.5]) == Mean(0.5, None)
    assert Mean.of([]) is None


def test_the_table_shows_each_arm_with_its_intervals() -> None:
    header, _, none, ours = as_markdown(summarise(GIVEN)).splitlines()
    assert header == f"| {' | '.join(COLUMNS)} |"
    assert none.startswith("| nothing | 0 of 2 (0% to 66%) |")
    for part in ("ours (1 not judged)", "1 of 3 (6% to 79%)", "0.40 (0.20 to 0.60)", "32.0 (30.0 to 34.0)", "1 of 2"):
        assert part in ours
    assert ours.count("|") == none.count("|") == header.count("|")


def test_a_training_that_diverged_is_named() -> None:
    (row,) = summarise([result("neggrad", 0, request("failed", 0.1), diverged=True)])
    assert "1 diverged" in cells(row)[0]


def test_the_plot_names_each_arm_and_is_the_same_every_time() -> None:
    rows = summarise(GIVEN)
    svg = pareto(rows, "faces: a title", "svg")
    text = " ".join(ElementTree.fromstring(svg).itertext())
    for words in ("faces: a title", "ours", "nothing", "excess reproduction left", "PSNR"):
        assert words in text
    assert svg == pareto(rows, "faces: a title", "svg")
    with Image.open(BytesIO(pareto(rows, "", "png"))) as picture:
        assert picture.format == "PNG"


def test_arms_without_a_figure_are_left_out_of_the_plot() -> None:
    absent = result("paper", 0, request("not_reproduced", None), psnr=None, collateral=None)  # pyright: ignore[reportArgumentType]
    assert b"the paper" not in pareto(summarise([*GIVEN, absent]), "", "svg")
