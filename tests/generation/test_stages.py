"""What each stage holds in memory: the components that it needs, and no more than one kind at a time."""

from datetime import UTC, datetime

import pytest
from torch import nn

from expunge.batch.plan import plan_night
from expunge.evaluation.measure import examine
from expunge.families.components import Components
from expunge.pixels import to_pictures, to_png
from expunge.preparation.prepare import prepare
from expunge.requests.blobs import open_blobs
from expunge.requests.imaging import normalise
from expunge.runs.job import JobFolder
from expunge.settings import load_settings
from expunge.testbed import flags
from expunge.types import RemovalBatch, RemovalRequest

QUICK = {
    "TRAINING__RETAIN_SIZE": "2",
    "EVALUATION__LEVELS": "[0.4]",
    "EVALUATION__SEEDS": "8",
    "EVALUATION__UNSEEN_PICTURES": "16",
    "EVALUATION__GENERATION_SAMPLES": "16",
    "EVALUATION__INTEGRITY_SAMPLES": "16",
    "EVALUATION__SAMPLING_STEPS": "2",
}


def test_a_stage_holds_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUICK.items():
        monkeypatch.setenv(f"EXPUNGE_{name}", value)
    settings = load_settings()
    blobs = open_blobs(settings)
    pictures = [normalise(to_png(one), field="flag", max_pixels=10_000) for one in to_pictures(flags.images()[0][:2])]
    target, surrogate = map(blobs.put, pictures)
    request = RemovalRequest(id="a", model="flags", images=(target,), surrogates=(surrogate,), external_id="a")
    batch = RemovalBatch(id="night", created=datetime(2026, 3, 1, tzinfo=UTC), requests=(request,))
    (job,) = plan_night(batch, settings, lambda model: (None, [])).jobs
    folder = JobFolder(settings.runs / batch.id / job.id)
    folder.job.write(job)

    read: list[tuple[str, frozenset[str]]] = []
    network = Components.network

    def watched(parts: Components, name: str) -> nn.Module:
        if name not in parts.held:
            read.append((name, parts.held))
        return network(parts, name)

    monkeypatch.setattr(Components, "network", watched)
    folder.prepared.write(prepare(folder, settings, blobs))
    alone = frozenset[str]()
    kinds = ("text_encoder", "text_encoder_2", "transformer", "vae")
    assert read == [(name, alone) for name in kinds], "one after the other, each once"

    read.clear()
    examine(folder, settings, blobs)
    assert {name for name, _ in read} == {"transformer", "vae"}
