"""Read the settings from the environment and the config file; refuse what is wrong by its name."""

from pydantic import ValidationError

from expunge.evaluation.settings import REPLACED
from expunge.settings.assembled import Settings
from expunge.settings.models import ModelSettings
from expunge.sources import check_variables, refused, setting_names
from expunge.unlearning.settings import RENAMED


def load_settings() -> Settings:
    """Raises InputError naming the setting or the file, and a hint. No value is in it: it may be a password."""
    check_variables(Settings)
    renamed = {**REPLACED, **{f"training.{old}": f"training.{new}" for old, new in RENAMED.items()}}
    known = [*setting_names(Settings), *setting_names(ModelSettings)]
    try:
        settings = Settings()  # pyright: ignore[reportCallIssue]  # the fields come from the sources
    except ValidationError as error:
        raise refused(error, (), known, renamed) from None
    for model in settings.models:
        for part, overridden in (("training", settings.training_for), ("gate", settings.gate_for)):
            try:
                overridden(model)
            except ValidationError as error:
                raise refused(error, ("models", model, part), known, renamed) from None
    return settings
