"""The footprint of published models and of the shipped ones."""

import pytest

from expunge.errors import InputError
from expunge.settings import Settings, TrainingSettings
from expunge.unlearning.memory import footprint

MODELS = Settings.model_validate({}).models
TRAINING = TrainingSettings.model_validate({"precision": "bf16"})


@pytest.mark.parametrize(("name", "parameters"), [("sd3-medium", 2_028_328_000), ("sd3.5-large", 8_056_627_520)])
def test_published_models_have_their_published_size(name: str, parameters: int) -> None:
    counted = footprint(name, {}, TRAINING.model_copy(update={"adapter": "full"}), 1)
    assert counted.parameters == counted.trained == parameters
    assert counted.weight_bytes == 2


def test_lora_on_a_family_without_targets_is_refused() -> None:
    with pytest.raises(InputError, match="no LoRA layers"):
        footprint("faces", MODELS, TRAINING.model_copy(update={"adapter": "lora"}), 1)


def test_checkpointing_keeps_less() -> None:
    kept = [
        footprint("flags", MODELS, TRAINING.model_copy(update={"activation_checkpointing": on}), 1).activations
        for on in (False, True)
    ]
    assert kept[1] < kept[0] / 3


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'sd4' is not known.* faces, flags, people, sd3-medium, sd3\.5-large"):
        footprint("sd4", MODELS, TRAINING, 1)
