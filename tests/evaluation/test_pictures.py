"""Grids keep every pixel; curves are valid, reproducible documents."""

from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.evaluation.pictures import GAP, curves, grid, rows_that_fit


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1


def opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


def test_every_image_stands_in_its_cell(images: torch.Tensor) -> None:
    picture = opened(grid(images, 3, scale=2))
    assert picture.size == (3 * 14 + 2 * GAP, 2 * 10 + GAP)
    pixel = picture.getpixel((14 + GAP + 2 * 3, 10 + GAP + 2 * 1))  # row 1, column 1, y 1, x 3
    expected = ((images[4, :, 1, 3] + 1) * 127.5).round().int().tolist()
    assert pixel == (*expected, 255)


def test_the_gaps_are_transparent(images: torch.Tensor) -> None:
    assert opened(grid(images, 3, scale=2)).getpixel((14 + 1, 3)) == (0, 0, 0, 0)


def test_grey_images_and_values_out_of_range(images: torch.Tensor) -> None:
    picture = opened(grid(images[:1, :1] * 1e6, 1, scale=1))
    assert picture.getpixel((0, 0)) in {(0, 0, 0, 255), (255, 255, 255, 255)}


@pytest.mark.parametrize(("side", "shown", "kind"), [(24, 96, "PNG"), (128, 256, "PNG"), (512, 512, "JPEG")])
def test_large_pictures_are_not_magnified_and_make_a_jpeg(side: int, shown: int, kind: str) -> None:
    image = torch.linspace(-1, 1, side).expand(1, 3, side, side)
    picture = opened(grid(image, 1))
    assert (picture.format, picture.size) == (kind, (shown, shown))
    assert np.asarray(picture)[shown // 2, -1, :3] == pytest.approx([255] * 3, abs=8)


def test_a_grid_of_large_pictures_has_fewer_rows() -> None:
    assert rows_that_fit(10, 32, 48) > 64
    assert 10 * rows_that_fit(10, 1024, 1024) <= 64
    assert rows_that_fit(10, 8192, 8192) == 1


def test_labels_take_room_and_are_not_cut(images: torch.Tensor) -> None:
    plain = opened(grid(images, 3, scale=2))
    labelled = opened(
        grid(images, 3, scale=2, column_labels=["target", "a long label", "c"], row_labels=["0.4", "0.6"])
    )
    assert labelled.width > plain.width
    assert labelled.height > plain.height


@pytest.mark.parametrize(
    ("columns", "labels", "match"),
    [
        (4, {}, "cannot lay"),
        (0, {}, "cannot lay"),
        (3, {"column_labels": ["one"]}, "labels do not fit"),
        (3, {"row_labels": ["one"]}, "labels do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(images: torch.Tensor, columns: int, labels: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        grid(images, columns, **labels)


def test_curves_are_reproducible_svg_with_readable_text() -> None:
    series = {"forget": [(i, 1 / (i + 1)) for i in range(50)], "retain": [(0, 0.1), (49, 0.2)]}
    first = curves(series, "loss <&>")
    assert first == curves(series, "loss <&>")
    assert "loss <&>" in "".join(ElementTree.fromstring(first).itertext())


def test_curves_as_png_with_values_that_are_no_numbers() -> None:
    data = curves({"loss": [(0, 1.0), (1, float("nan")), (2, 0.5)]}, kind="png", size=(2, 1))
    assert opened(data).size == (360, 180)
