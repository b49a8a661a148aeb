"""What `mlflow.pyfunc.load_model("models:/NAME@champion")` returns: a model whose `predict` generates pictures.

    model = mlflow.pyfunc.load_model("models:/sd3@champion")
    made = model.predict(pandas.DataFrame({"prompt": ["a lake"], "seed": [7]}), params={"num_inference_steps": 20})
    made["png"][0]  # bytes

A row asks for `count` pictures (default 1) of the seeds `seed`, `seed` + 1, ...; a model without prompts takes none.
The base model is read from where the version was trained; `model_config={"base": SOURCE}` names another place.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import InputError, StorageError
from expunge.registry import seals

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from pandas import DataFrame

AT_ONCE = 4
"""Pictures per call of the pipeline. It changes how a result is rounded, and nothing else."""


class Generator:
    """Generates pictures with a hotfixed pipeline, on a GPU where there is one."""

    def __init__(self, pipeline: "DiffusionPipeline", resolution: tuple[int, int]) -> None:
        """resolution: height and width in pixels, for pipelines that take them."""
        import torch

        self._pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self._pipeline.set_progress_bar_config(disable=True)
        self._takes = frozenset(inspect.signature(type(pipeline).__call__).parameters)
        self._size = dict(zip(("height", "width"), resolution, strict=True)) if "height" in self._takes else {}

    def predict(self, model_input: "DataFrame", params: Mapping[str, Any] | None = None) -> "DataFrame":
        """Return a row per picture: its `seed`, and `png`, the picture's bytes.

        params: `num_inference_steps` and `guidance_scale`; default: the pipeline's own. Raises InputError where a row
        or a parameter is of no use to this model.
        """
        import pandas

        options = {name: value for name, value in (params or {}).items() if value is not None}
        for name in options:
            if name not in self._takes:
                raise InputError(f"params: {type(self._pipeline).__name__} takes no {name}", hint="leave it out")
        wanted = self._wanted(model_input)
        made = []
        for start in range(0, len(wanted), AT_ONCE):
            made += self._generate(wanted[start : start + AT_ONCE], options)
        seeds = pandas.Series([seed for seed, _ in wanted], dtype="int64")
        return pandas.DataFrame({"seed": seeds, "png": pandas.Series(made, dtype="object")})

    def _wanted(self, rows: "DataFrame") -> list[tuple[int, str]]:
        """Return seed and prompt of every picture."""
        found = []
        for row in rows.to_dict("records"):
            prompt, count = row.get("prompt") or "", row.get("count")
            count = 1 if count is None else int(count)
            if prompt and "prompt" not in self._takes:
                raise InputError("prompt: this model takes none", hint="leave the column out")
            if count < 1:
                raise InputError(f"count: {count} is not positive", hint="ask for at least one picture per row")
            found += [(int(row["seed"]) + one, str(prompt)) for one in range(count)]
        return found

    def _generate(self, wanted: list[tuple[int, str]], options: Mapping[str, Any]) -> list[bytes]:
        import numpy as np
        import torch

        from expunge.pixels import to_png

        asked = {"prompt": [prompt for _, prompt in wanted]} if "prompt" in self._takes else {"batch_size": len(wanted)}
        generators = [torch.Generator().manual_seed(seed) for seed, _ in wanted]  # on the host: the same on any device
        made = self._pipeline(**asked, **self._size, **options, generator=generators, output_type="np")  # pyright: ignore
        return [to_png(picture.squeeze()) for picture in (np.asarray(made.images) * 255).round().astype(np.uint8)]


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Generator:
    """Load the version in the folder `path`, as MLflow asks for it. Raises StorageError if a file was changed."""
    from expunge.registry.pipelines import pipeline_of

    folder = Path(path)
    try:
        about = seals.check_folder(folder, None)
    except seals.BrokenSealError as error:
        raise StorageError(f"{folder}: {error}", hint="restore the artifact store, or roll back") from None
    height, width = about["resolution"]
    return Generator(pipeline_of(folder, base=(model_config or {}).get("base") or None), (height, width))
