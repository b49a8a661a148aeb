"""Everything that can be set, put together from the sections of the components.

Precedence: `EXPUNGE_*` variables (nested by `__`, e.g. `EXPUNGE_GATE__MIN_PSNR=24`), then the file named by
`EXPUNGE_CONFIG` or `$EXPUNGE_HOME/config.toml`, then the defaults of the sections.
"""

from expunge.batch.settings import NightSettings
from expunge.evaluation.settings import EvaluationSettings, GateSettings
from expunge.section import IDENTIFIER, IDENTIFIER_RULE, Fraction, Resolution, Section
from expunge.settings.assembled import Settings
from expunge.settings.load import load_settings
from expunge.settings.models import ModelSettings
from expunge.unlearning.settings import (
    OFFLOAD_STAGES,
    RENAMED,
    URL_OPTIONS,
    ClusterSettings,
    MethodSettings,
    RetainSettings,
    ShardingSettings,
    TrainingSettings,
)

__all__ = [
    "IDENTIFIER",
    "IDENTIFIER_RULE",
    "OFFLOAD_STAGES",
    "RENAMED",
    "URL_OPTIONS",
    "ClusterSettings",
    "EvaluationSettings",
    "Fraction",
    "GateSettings",
    "MethodSettings",
    "ModelSettings",
    "NightSettings",
    "Resolution",
    "RetainSettings",
    "Section",
    "Settings",
    "ShardingSettings",
    "TrainingSettings",
    "load_settings",
]
