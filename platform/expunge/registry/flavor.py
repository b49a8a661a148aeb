"""What makes a registered version a model of MLflow's own: `MLmodel`, its signature and its requirements.

`mlflow.pyfunc.load_model` then imports `expunge.registry.serving`, which reads the version's files. Nothing is pickled,
and the base model is named by source and digest, not copied.
"""

import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LOADER = "expunge.registry.serving"
INSTALLED = ("expunge", "diffusers", "mlflow", "peft", "safetensors", "torch", "transformers")
"""The packages whose versions decide what a version generates."""


def write_flavor(folder: Path, metadata: Mapping[str, object], run_id: str) -> None:
    """Write MLflow's files to `folder`, which must be absent or empty. metadata: goes into `MLmodel` as it is."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    pictures = Schema(
        [
            ColSpec("long", "seed"),
            ColSpec("string", "prompt", required=False),
            ColSpec("long", "count", required=False),
        ]
    )
    signature = ModelSignature(
        inputs=pictures,
        outputs=Schema([ColSpec("long", "seed"), ColSpec("binary", "png")]),
        params=ParamSchema(
            [ParamSpec("num_inference_steps", "long", None), ParamSpec("guidance_scale", "double", None)]
        ),
    )
    with warnings.catch_warnings():
        # It asks for an input example, which the signature makes superfluous, and which it would have to generate.
        warnings.simplefilter("ignore", UserWarning)
        save_model(
            folder,
            loader_module=LOADER,
            mlflow_model=Model(run_id=run_id),
            model_config={"base": ""},
            metadata=dict(metadata),
            signature=signature,
            pip_requirements=requirements(),
        )


def requirements() -> list[str]:
    """Return what is installed here as pip requirements. A local build, such as torch's +cpu, is on no index."""
    found = []
    for package in INSTALLED:
        try:
            found.append(f"{package}=={version(package).partition('+')[0]}")
        except PackageNotFoundError:  # Expunge itself, where it runs from its sources
            found.append(package)
    return found
