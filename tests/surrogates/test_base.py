"""Editors by name, their options, and the mask in force."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from expunge import surrogates
from expunge.errors import InputError
from expunge.settings import ModelSettings
from expunge.surrogates import check_edit, editor_names, make_editor
from expunge.surrogates.base import ellipse_mask, region
from expunge.types import EditSpec


def test_every_editor_is_a_file() -> None:
    assert editor_names() == ["blend", "inpaint", "regenerate"]


def test_an_unknown_editor_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"edit\.editor: 'paint' is unknown: use one of blend, inpaint, regenerate"):
        make_editor(EditSpec(editor="paint"))


@pytest.mark.parametrize("name", ["base", "blend.x", "expunge"])
def test_only_editors_are_imported(name: str) -> None:
    with pytest.raises(InputError, match=r"edit\.editor: .* is unknown"):
        make_editor(EditSpec(editor=name))
    assert f"expunge.surrogates.{name}" not in sys.modules or name == "base"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mod": "soft"}, r"edit\.options\.mod: .*: use one of mode, ellipse, strength, align, match"),
        ({"mode": "hard"}, r"edit\.options\.mode: .*: mode is soft or seamless"),
        ({"strength": "2"}, r"edit\.options\.strength: .*: strength is a number from 0"),
        ({"ellipse": "0.5/0.5"}, r"edit\.options\.ellipse\b.*: ellipse is cx/cy/rx/ry"),
        ({"match": "perhaps"}, r"edit\.options\.match: .*: match is true or false"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_editor(EditSpec(editor="blend", options=options))


PINNED = f"someone/inpainting@{'0' * 40}"


def model(**settings: object) -> ModelSettings:
    return ModelSettings.model_validate({"source": "testbed:faces", **settings})


@pytest.mark.parametrize(
    ("spec", "settings", "says"),
    [
        ({"editor": "paint"}, {}, r"edit\.editor: 'paint' is unknown: use one of blend, inpaint, regenerate"),
        (
            {"editor": "inpaint"},
            {"editors": ["blend"]},
            r"edit\.editor: 'inpaint' is not allowed here: use blend or regenerate, or",
        ),
        ({"editor": "blend", "options": {"mod": "soft"}}, {}, r"edit\.options\.mod: .*: use one of mode"),
        ({"editor": "inpaint"}, {}, r"edit\.options\.model: "),
        (
            {"editor": "inpaint", "options": {"model": "/etc"}},
            {},
            r"model: '/etc' is not allowed here: the model's ed",
        ),
        (
            {"editor": "inpaint", "options": {"model": "/etc"}},
            {"editor_models": [PINNED]},
            rf"edit\.options\.model: '/etc' is not allowed here: use {PINNED}",
        ),
        (
            {"editor": "inpaint", "options": {"model": "someone/inpainting"}},
            {"editor_models": [PINNED]},
            "'someone/inpainting' is not allowed here",
        ),
        ({"editor": "inpaint"}, {"editor_models": ["/a", "/b"]}, "several are allowed: use /a or /b"),
        ({"editor": "inpaint", "options": {"steps": "0"}}, {"editor_models": ["/a"]}, r"edit\.options\.steps: "),
    ],
)
def test_a_request_may_use_what_the_settings_allow_alone(
    spec: dict[str, object], settings: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        check_edit(EditSpec.model_validate(spec), model(**settings))


def test_an_edit_that_is_allowed_passes_and_gets_its_model() -> None:
    plain = EditSpec(editor="blend", options={"strength": "0.5"})
    assert check_edit(plain, model()) == plain
    named = EditSpec(editor="inpaint", options={"model": "/b", "steps": "4"})
    assert check_edit(named, model(editor_models=["/a", "/b"])) == named
    bare = EditSpec(editor="inpaint", options={"steps": "4"}, mask="a" * 64)
    filled = check_edit(bare, model(editor_models=[PINNED]))
    assert filled == bare.model_copy(update={"options": {"steps": "4", "model": PINNED}})
    own = model(editor="inpaint", editors=[], editor_models=[PINNED])
    assert check_edit(EditSpec(editor="inpaint"), own).options == {"model": PINNED}


def test_another_editor_is_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an option `model` it gets the only model there is. A module that begins with `_` is a helper."""
    (tmp_path / "stamp.py").write_text(
        "from dataclasses import dataclass\n"
        "from expunge.surrogates.base import Options, editor\n"
        "class StampOptions(Options):\n    model: str\n"
        "@editor('stamp', StampOptions)\n@dataclass\nclass Stamp:\n    options: StampOptions\n"
    )
    (tmp_path / "_helper.py").write_text("")
    monkeypatch.setattr(surrogates, "__path__", [*surrogates.__path__, str(tmp_path)])
    assert editor_names() == ["blend", "inpaint", "regenerate", "stamp"]
    allowing = model(editors=["stamp"], editor_models=[PINNED])
    assert check_edit(EditSpec(editor="stamp"), allowing).options == {"model": PINNED}
    with pytest.raises(InputError, match=r"edit\.options\.model: "):
        make_editor(EditSpec(editor="stamp"))


def test_an_edit_is_checked_without_torch() -> None:
    code = (
        "import sys; from expunge.settings import ModelSettings; from expunge.surrogates import check_edit\n"
        "from expunge.types import EditSpec\n"
        "model = ModelSettings(source='testbed:faces', editor_models=('/a',))\n"
        "for name in ('blend', 'inpaint', 'regenerate'): check_edit(EditSpec(editor=name), model)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("height", "width"), [(24, 24), (32, 48), (25, 7)])
def test_the_ellipse_is_centred_and_has_its_area(height: int, width: int) -> None:
    mask = ellipse_mask(height, width, (0.5, 0.5, 0.4, 0.3))
    assert mask.shape == (height, width)
    assert (mask == mask[::-1]).all()
    assert (mask == mask[:, ::-1]).all()
    assert mask.mean() == pytest.approx(np.pi * 0.4 * 0.3, abs=0.05)


def test_the_mask_must_fit_and_mark_something() -> None:
    target = np.zeros((24, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"edit\.mask: .*24x32 pixels, but the image has 32x24"):
        region(target, np.ones((32, 24), bool), (0.5, 0.5, 0.4, 0.4))
    with pytest.raises(InputError, match=r"edit\.mask: nothing is marked"):
        region(target, np.zeros((24, 32), bool), (0.5, 0.5, 0.4, 0.4))
