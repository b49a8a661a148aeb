"""A box is cut out before anything is stored, from what belongs to the image too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from expunge.errors import InputError
from expunge.requests.blobs import BlobStore
from expunge.requests.box import lost, same_shape
from expunge.requests.imaging import to_array
from expunge.requests.intake import accept
from expunge.requests.store import RequestStore
from expunge.requests.submission import Submission, validated
from expunge.settings import Settings
from expunge.types import RemovalRequest

Submit = Callable[..., RemovalRequest]

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def submit(settings: Settings, store: RequestStore, blobs: BlobStore, tmp_path: Path) -> Submit:
    """60 x 40 pixels in a.png and b.png; c.png has other pixels of this size, cut.png those of a box of it."""
    for name in ("a.png", "b.png"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    Image.fromarray(255 - PIXELS).save(tmp_path / "c.png")
    Image.fromarray(255 - PIXELS[5:35, 10:50]).save(tmp_path / "cut.png")
    Image.fromarray(PIXELS[:20, :20]).save(tmp_path / "other.png")

    def call(**fields: object) -> RemovalRequest:
        submission = validated(Submission, {"model": "flags", "images": ["a.png"], **fields})
        record, _ = accept(submission, settings=settings, store=store, blobs=blobs, base=tmp_path)
        return record.request

    return call


@pytest.mark.parametrize(
    "box",
    [
        "10,5,50,35",
        [10, 5, 50, 35],
        [[10, 5, 50, 35]],
        ["10,5,50,35"],
        ["10, 5, 50, 35"],
        [10 / 60, 5 / 40, 50 / 60, 35 / 40],
        "0.1667,0.125,0.8333,0.875",
    ],
)
def test_the_box_is_what_is_stored(submit: Submit, blobs: BlobStore, box: object) -> None:
    stored = to_array(blobs.get(submit(box=box).images[0]))
    assert np.array_equal(stored, PIXELS[5:35, 10:50])


def test_one_box_for_all_or_one_for_each(submit: Submit, blobs: BlobStore) -> None:
    both = ["a.png", "c.png"]
    same = submit(images=both, box=[0, 0, 0.5, 1])
    assert [to_array(blobs.get(blob)).shape for blob in same.images] == [(40, 30, 3)] * 2
    each = submit(images=both, box=[[0, 0, 0.5, 1], [0, 0, 60, 20]])
    assert [to_array(blobs.get(blob)).shape for blob in each.images] == [(40, 30, 3), (20, 60, 3)]


def test_a_box_is_one_of_the_upright_picture(submit: Submit, blobs: BlobStore, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    stored = to_array(blobs.get(submit(images=["turned.png"], box=[0, 0, 40, 10]).images[0]))
    assert np.array_equal(stored, np.rot90(PIXELS, -1)[:10])


@pytest.mark.parametrize("beside", ["c.png", "cut.png"])
def test_surrogates_and_masks_are_cut_alike_or_cut_already(submit: Submit, blobs: BlobStore, beside: str) -> None:
    wanted = 255 - PIXELS[5:35, 10:50]
    request = submit(box="10,5,50,35", surrogates=[beside])
    assert np.array_equal(to_array(blobs.get(request.surrogates[0])), wanted)
    edited = submit(box="10,5,50,35", edit=f"blend:mask={beside}").edit
    assert edited is not None
    assert edited.mask is not None
    assert np.array_equal(to_array(blobs.get(edited.mask)), wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"box": "10,5,61,35"}, r"^box: 10,5,61,35 reaches beyond images\[0\], which is 60 x 40: write left,top"),
        ({"box": "10,5,17,35"}, r"^box: 10,5,17,35 leaves 7 x 30 pixels of images\[0\]: .* at least 8 pixels"),
        ({"box": "50,5,10,35"}, "^box: 50,5,10,35 is upside down"),
        ({"box": "0,0,0,0"}, "leaves 0 x 0 pixels"),
        ({"box": "0.9,0,1,1"}, "leaves 6 x 40 pixels"),
        ({"box": "1,2,3"}, "^box.0: write four numbers: left,top,right,bottom"),
        ({"box": "a,b,c,d"}, "^box.0: write four numbers"),
        ({"box": [1, 2, 3]}, "^box.0: write four numbers"),
        ({"box": [-1, 0, 20, 20]}, "^box.0.0: Input should be greater than or equal to 0"),
        ({"box": "nan,0,20,20"}, "^box.0.0: Input should be"),
        ({"box": "inf,0,20,20"}, "^box.0.0: Input should be a finite number"),
        ({"box": [True, 0, 20, 20]}, "^box.0.0: Input should be a valid number"),
        ({"box": [["1", "2", "30", "30"]]}, "^box.0.0: Input should be a valid number"),
        ({"box": {"left": 1}}, "^box: give a list"),
        ({"box": ["0,0,1,1"] * 3}, "^3 boxes for 1 images: give one for all, one for each, or none"),
        (
            {"box": "10,5,50,35", "surrogates": ["other.png"]},
            r"^surrogates\[0\]: 20 x 20 pixels, but its image has 60 x 40 and the box 40 x 30: give it in one of",
        ),
        ({"box": "10,5,50,35", "edit": "blend:mask=other.png"}, r"^edit\.mask: 20 x 20 pixels, but its image has"),
    ],
)
def test_a_box_that_cannot_be_cut(submit: Submit, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        submit(**fields)


@pytest.mark.parametrize(
    ("size", "resolution", "share", "side"),
    [
        ((64, 64), (64, 64), 0.0, None),
        ((128, 64), (64, 64), 0.5, "width"),
        ((64, 128), (64, 64), 0.5, "height"),
        ((48, 32), (32, 48), 0.0, None),
        ((300, 400), (32, 48), 0.5, "height"),
    ],
)
def test_what_is_lost_is_what_scaling_cuts_away(
    size: tuple[int, int], resolution: tuple[int, int], share: float, side: str | None
) -> None:
    found = lost(size, resolution)
    assert found[0] == pytest.approx(share)
    assert side is None or found[1] == side


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((640, 480), (640, 480), True),
        ((640, 480), (320, 240), True),
        ((641, 480), (320, 240), True),
        ((640, 480), (480, 640), False),
        ((640, 480), (640, 400), False),
    ],
)
def test_same_shape(one: tuple[int, int], other: tuple[int, int], same: bool) -> None:
    assert same_shape(one, other) is same
