"""Editors by name, their options, and the mask in force."""

import sys

import numpy as np
import pytest

from expunge.errors import InputError
from expunge.surrogates import editor_names, make_editor
from expunge.surrogates.base import ellipse_mask, region
from expunge.words import EditSpec


def test_every_editor_is_a_file() -> None:
    assert editor_names() == ["blend", "inpaint"]


def test_an_unknown_editor_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"edit\.editor: 'paint' is unknown: use one of blend, inpaint"):
        make_editor(EditSpec(editor="paint"))


@pytest.mark.parametrize("name", ["base", "blend.x", "expunge"])
def test_only_editors_are_imported(name: str) -> None:
    with pytest.raises(InputError, match=r"edit\.editor: .* is unknown"):
        make_editor(EditSpec(editor=name))
    assert f"expunge.surrogates.{name}" not in sys.modules or name == "base"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mod": "soft"}, r"edit\.options\.mod: .*: known are mode, ellipse, strength, match"),
        ({"mode": "hard"}, r"edit\.options\.mode: .*: mode is soft or seamless"),
        ({"strength": "2"}, r"edit\.options\.strength: .*: strength is a number from 0"),
        ({"ellipse": "0.5/0.5"}, r"edit\.options\.ellipse: .*: ellipse is cx/cy/rx/ry"),
        ({"match": "perhaps"}, r"edit\.options\.match: .*: match is true or false"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_editor(EditSpec(editor="blend", options=options))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (32, 48), (25, 7)])
def test_the_ellipse_is_centred_and_has_its_area(height: int, width: int) -> None:
    mask = ellipse_mask(height, width, (0.5, 0.5, 0.4, 0.3))
    assert mask.shape == (height, width)
    assert (mask == mask[::-1]).all()
    assert (mask == mask[:, ::-1]).all()
    assert mask.mean() == pytest.approx(np.pi * 0.4 * 0.3, abs=0.05)


def test_the_mask_must_fit_and_mark_something() -> None:
    target = np.zeros((24, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"edit\.mask: 24x32 pixels, the image has 32x24"):
        region(target, np.ones((32, 24), bool), (0.5, 0.5, 0.4, 0.4))
    with pytest.raises(InputError, match=r"edit\.mask: nothing is marked"):
        region(target, np.zeros((24, 32), bool), (0.5, 0.5, 0.4, 0.4))
