"""The checks of a pipeline's config files: anything that its family cannot do is refused by file and field."""

from collections.abc import Mapping

from expunge.errors import InputError
from expunge.families.layout import Config, Layout
from expunge.families.supported import family_of
from expunge.families.weights import COMPLETE
from expunge.settings import Resolution

_LIBRARIES = ("diffusers", "transformers")

_NOT_BUILT = ("scheduler", "tokenizer", "feature_extractor", "image_encoder")
"""Components, by how diffusers' names for them begin, that have no config.json or that no family uses."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
"""Files that hold a tokenizer's vocabulary."""

_DEPTHS = ("layers_per_block", "num_layers", "num_hidden_layers")
_DEEPEST = 1000


def check(layout: Layout, configured: Resolution | None) -> Resolution:
    """Return (height, width) in pixels that the model is used at: the configured one, else the pipeline's own.

    Raises InputError naming the file and the field where something is missing, wrong or not supported.
    """
    family = family_of(layout)
    for name in layout.components():
        if layout.library_of(name) not in _LIBRARIES:
            raise layout.index.refuse(name, "its class must be of diffusers or transformers")
        if name.startswith("tokenizer"):
            _check_tokenizer(layout, name)
        if not name.startswith(_NOT_BUILT):
            _check_depth(layout.config(name))
    _check_classes(layout, family.classes)
    for name in family.classes:
        encoder = name.replace("tokenizer", "text_encoder")
        if name != encoder and (layout.class_of(name) is None) != (layout.class_of(encoder) is None):
            raise layout.index.refuse(name, f"{name} and {encoder} are there together or not at all")
    family.check(layout)
    return family.resolution(layout, configured)


def _check_tokenizer(layout: Layout, name: str) -> None:
    """Refuse a tokenizer without its vocabulary, which would be missed only when the night's first prompt is read."""
    folder = layout.part(name)
    if not any((folder / file).is_file() for file in _VOCABULARIES):
        missing = f"{name} has none of {', '.join(_VOCABULARIES)}"
        raise InputError(f"{layout.label}: {missing}", hint=COMPLETE)


def _check_depth(config: Config) -> None:
    """Refuse a network of a million layers: the deep preflight would need hours to build it, and all the memory."""
    for name in _DEPTHS:
        given = config.fields.get(name)
        for depth in given if isinstance(given, list) else [given]:
            if isinstance(depth, int | float) and depth > _DEEPEST:
                raise config.refuse(name, f"must be at most {_DEEPEST}")


def _check_classes(layout: Layout, supported: Mapping[str, tuple[str, ...]]) -> None:
    for name, known in supported.items():
        kind = layout.class_of(name)
        if kind is None and "" in known:
            continue
        if kind is None:
            raise layout.index.refuse(name, "the pipeline needs it")
        if kind not in known:
            use = " or ".join(filter(None, known))
            raise InputError(f"{layout.label}: {name}: {kind} is not supported", hint=f"use a pipeline with {use}")
