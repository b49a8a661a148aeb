"""A new base model arrives: the champion's removals are unlearned from it in a night of their own."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from expunge.families import resolve_source
from expunge.registry.artifacts import ledger
from expunge.registry.versions import all_versions, champion
from expunge.types import RequestState
from tests.integration.nights import Nights

MODEL = "replayed"

pytestmark = pytest.mark.slow


@pytest.fixture
def new_base(nights: Nights) -> Path:
    """The faces model after a little more training, as far as its files tell."""
    folder = nights.home.parent / "new-base"
    shutil.copytree(resolve_source("testbed:faces"), folder)
    [file] = folder.rglob("*.safetensors")
    save_file({name: weights * 1.001 for name, weights in load_file(file).items()}, file, {"format": "pt"})
    return folder


def test_a_champions_removals_are_unlearned_from_a_new_base(nights: Nights, new_base: Path) -> None:
    request = nights.submit(MODEL, 3)
    first = nights.night("night-replayed", MODEL)
    assert first.code == 0, first.out + first.err
    done = nights.expunge("replay", MODEL, "--source", str(new_base), "--json")
    assert done.code == 0, done.out + done.err
    told = json.loads(done.out)
    assert (told["version"], told["removed"], told["refused"]) == (f"models:/{MODEL}/2", [request], {})
    current = champion(nights.tracker, MODEL)
    assert current is not None
    assert current.version == "1"
    record = nights.store.get(request)
    assert record.state is RequestState.REMOVED
    assert [event.batch for event in record.history if event.batch] == ["night-replayed"] * 2
    [job] = nights.outcome(told["batch"]).outcomes
    assert job.job.source == str(new_base)
    assert job.job.base != nights.outcome("night-replayed").outcomes[0].job.base
    shown = nights.expunge("verdicts", told["batch"])
    assert shown.code == 0, shown.out + shown.err
    assert "passed" in shown.out
    again = nights.expunge("replay", MODEL, "--source", str(new_base), "--json")
    assert json.loads(again.out) == told, "it has ended, so nothing is run again"
    assert [str(version.version) for version in all_versions(nights.tracker, MODEL)] == ["1", "2"]
    refused = nights.expunge("promote", MODEL, "2", "--yes")
    assert refused.code == 2
    assert f"set models.{MODEL}.source to the base model that it was trained from" in refused.err
    promoted = nights.expunge("promote", MODEL, "2", "--yes", EXPUNGE_MODELS__REPLAYED__SOURCE=str(new_base))
    assert promoted.code == 0, promoted.out + promoted.err
    assert ledger(nights.tracker, MODEL) == ledger(nights.tracker, MODEL).model_copy(
        update={"version": "2", "requests": (request,)}
    )
