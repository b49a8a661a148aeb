"""The sections of the settings: joined, they are what users and stored jobs know; alone, a function can take them."""

import json
from typing import cast, get_args

import pytest
import torch
from pydantic import ValidationError

from expunge.evaluation.gate import loosened
from expunge.runs.formats import read_job
from expunge.settings import (
    ClusterSettings,
    EvaluationSettings,
    GateSettings,
    MethodSettings,
    RetainSettings,
    ShardingSettings,
    TrainingSettings,
)
from expunge.unlearning.adapter import kind_of
from expunge.unlearning.engine.config import deepspeed_config
from expunge.unlearning.engine.surgery import choose
from expunge.unlearning.objectives import micro_batches
from expunge.unlearning.settings import RENAMED
from unlearn_kernels import SURGERIES

RELEASED = (
    '{"steps":150,"steps_cover":4,"forget_batch":8,"retain_batch":8,"learning_rate":0.0002,"clip":1.0,'
    '"weighting":"min_snr","density":"uniform","min_snr_gamma":1.0,"band_level":0.45,"band_width":0.8,'
    '"forget_target":"recognition","retain_target":"distill","surgery":"retain_normal","tasks":"auto",'
    '"tasks_per_step":32,"surgery_granularity":"global","forget_weight":0.5,"adaptive":false,"probe_every":10,'
    '"forgotten_at":0.6,"adapter":"auto","lora_rank":16,"zero_stage":1,"precision":"fp32",'
    '"activation_checkpointing":false,"offload_optimizer":false,"micro_batch":0,"device":"auto","workers":2,'
    '"min_workers":0,"worker_timeout_s":1800,"max_bad_steps":3,"checkpoint_every":50,"checkpoint_url":"",'
    '"keep_checkpoints":2,"retain_size":64,"retain_folder":null,"max_failures":2,"seed":0}'
)
"""The default `[training]` table of the first release, as jobs have stored it."""


def test_the_settings_of_a_stored_job_are_read() -> None:
    request = {"id": "req-1", "model": "faces", "images": ["0" * 64], "external_id": "1"}
    job = {"batch": "b", "model": "faces", "source": "testbed:faces", "resolution": [24, 24], "requests": [request]}
    stored = json.dumps({**job, "training": json.loads(RELEASED)})
    read = read_job(stored.encode(), "faces-1").training.model_dump(mode="json")
    kept = {RENAMED.get(name, name): value for name, value in json.loads(RELEASED).items()}
    assert kept.items() <= read.items()
    assert read["views"] == TrainingSettings().views


@pytest.mark.parametrize("section", [MethodSettings, ShardingSettings, ClusterSettings, RetainSettings])
def test_every_section_stands_alone(section: type[MethodSettings]) -> None:
    assert section().model_dump().items() <= TrainingSettings().model_dump().items()


def test_every_surgery_can_be_chosen() -> None:
    assert get_args(MethodSettings.model_fields["surgery"].annotation) == SURGERIES


def test_every_setting_is_in_one_section() -> None:
    sections = (MethodSettings, ShardingSettings, ClusterSettings, RetainSettings)
    names = [name for section in sections for name in section.model_fields]
    assert sorted(names) == sorted(TrainingSettings.model_fields)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ShardingSettings, {"precision": "fp16"}),
        (ShardingSettings, {"offload_optimizer": True, "zero_stage": 2}),
        (ClusterSettings, {"min_workers": 3}),
        (ClusterSettings, {"checkpoint_url": "s3://key@bucket/x"}),
        (TrainingSettings, {"forget_batch": 3}),
        (TrainingSettings, {"adaptive": True, "probe_every": 7}),
    ],
)
def test_a_section_refuses_what_contradicts_itself(section: type[TrainingSettings], values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="Value error"):
        section.model_validate(values)


def test_a_function_takes_its_section_alone() -> None:
    config = deepspeed_config(ShardingSettings(zero_stage=3))
    assert cast(dict[str, object], config["zero_optimization"])["stage"] == 3
    assert len(micro_batches(ShardingSettings(micro_batch=2), torch.arange(8), 0, 1)) == 4
    assert kind_of(("to_q",), MethodSettings(adapter="full")) == "full"
    coefficients = choose(torch.eye(3, dtype=torch.float64), MethodSettings(surgery="none", forget_weight=0.5), 0)
    assert coefficients.tolist() == [0.25, 0.25, 1.0]
    assert loosened(GateSettings(min_psnr=10), EvaluationSettings())
