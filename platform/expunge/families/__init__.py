"""The diffusion models behind one small protocol; each family is one file.

Public: everything in `__all__`, the types in `base`, `family` and `path`, `supported` (which family a pipeline has),
`weights` (file names), and for those who may wait for torch `architectures`, `loading` and `sampler`. The one thing
that is taken from a family itself is `sd3.fill_in_shift`, which inpainting with SD3 needs as well.
"""

from typing import TYPE_CHECKING

from expunge.errors import InputError
from expunge.families.checks import check
from expunge.families.preflight import deep_preflight, preflight
from expunge.families.source import locate, pinned_source, resolve_source, source_digest
from expunge.families.supported import family_of
from expunge.settings import ModelSettings, Resolution

if TYPE_CHECKING:
    import torch

    from expunge.families.family import Family

__all__ = [
    "deep_preflight",
    "load_model",
    "pinned_source",
    "preflight",
    "resolve_source",
    "source_digest",
]


def load_model(
    settings: ModelSettings,
    resolution: Resolution,
    digest: str | None = None,
    *,
    device: "torch.device | str" = "cpu",
    exact: bool = False,
) -> "Family":
    """Open a base model for one resolution: each network is read, frozen, when it is first asked for.

    device: where the networks go. exact: compute in float32 even what is large and stored in half precision.

    Raises InputError where weights or files are missing, where the model is not supported at this resolution, or where
    its files are not those of `digest`.
    """
    layout = locate(pinned_source(settings), f"model {settings.source}", weights=True)
    check(layout, resolution)
    if digest is not None and layout.digest() != digest:
        raise InputError(
            f"model {settings.source}: its files are not those that the night was planned with",
            hint="give every node the same files, and run the night again",
        )

    from expunge.families.components import Components  # not above: it costs seconds

    return family_of(layout)(Components(layout, device, exact=exact), resolution, settings)
