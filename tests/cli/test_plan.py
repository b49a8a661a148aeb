"""`expunge plan` prints what fits, and names the settings to choose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.tiny import ddpm, edit

Command = Callable[..., Any]


def test_the_choice_is_marked_and_said(command: Command) -> None:
    shown = command("plan", "--model", "flags", "--gpus", "2", "--gpu-memory", "1")
    assert shown.code == 0
    assert "set training.zero_stage = 1 and training.objectives = request" in shown.out
    assert "MB per GPU" in shown.out


def test_json_holds_bytes(command: Command) -> None:
    printed = command("plan", "--model", "flags", "--gpus", "2", "--requests", "4", "--json").json
    assert [row["stage"] for row in printed["estimates"] if row["chosen"]] == [1]
    (row,) = (r for r in printed["estimates"] if (r["stage"], r["objectives"]) == (1, "request"))
    assert row["stash"] == 4 * printed["trained"] // 2 * 2
    assert row["total"] == sum(row[p] for p in ("weights", "gradient", "stash", "optimizer", "activations"))


def test_offload_moves_the_optimizer_to_the_host(command: Command) -> None:
    arguments = ["plan", "--model", "flags", "--gpus", "2", "--gpu-memory", "1", "--offload"]
    rows = command(*arguments, "--json").json["estimates"]
    assert [row["stage"] for row in rows] == [1, 1, 3, 3]
    assert all(row["host"] > 0 == row["optimizer"] for row in rows)
    shown = command(*arguments)
    assert (
        "set training.offload_optimizer = true, training.zero_stage = 1 and training.objectives = request" in shown.out
    )
    assert "host" in shown.out


def test_the_cost_of_a_batch_is_printed_by_stage(command: Command) -> None:
    arguments = ["plan", "--model", "flags", "--requests", "16", "--gpus", "2", "--utilisation", "0.5", "--price", "4"]
    rows = {row["stage"]: row for row in command(*arguments, "--gpu", "a100", "--json").json["cost"]}
    assert list(rows) == ["prepare", "examine", "train", "evaluate", "total"]
    total = rows.pop("total")
    assert total["passes"] == sum(row["passes"] for row in rows.values())
    assert total["gpu_hours"] == pytest.approx(total["flop"] / (312e12 * 0.5) / 3600)
    assert total["hours"] == pytest.approx(total["gpu_hours"] / 2)
    assert total["cost"] == pytest.approx(4 * total["gpu_hours"])
    assert total["cost_per_request"] == pytest.approx(total["cost"] / 16)
    shown = command(*arguments, "--gpu", "a100")
    assert "156 TFLOP/s per GPU, 50% of its peak; 4 per GPU-hour" in shown.out
    assert f"{total['passes']:,}" in shown.out


def test_three_batches_are_priced_where_none_is_asked_for(command: Command) -> None:
    printed = command("plan", "--model", "flags", "--json").json
    totals = [row for row in printed["cost"] if row["stage"] == "total"]
    assert [row["requests"] for row in totals] == [1, 16, 256]
    assert totals[0]["cost_per_request"] > totals[2]["cost_per_request"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "flags", "--adapter", "tiny"], "--adapter: Input should be 'auto', 'lora' or 'full'"),
        (["--model", "flags", "--precision", "int8"], "--precision: Input should be "),
        (["--model", "flags", "--precision", "fp16"], "precision: fp16 needs a loss scale"),
        (["--model", "flags", "--gpu", "v100"], "--gpu: Input should be 'a100', 'h100' or 'h200'"),
        (["--model", "faces", "--adapter", "lora"], "this family has no LoRA layers"),
        (
            ["--model", "sd9"],
            "'sd9' is not known: use one of faces, flags, people, sd3-medium, sd3.5-large, ",
        ),
    ],
)
def test_bad_input_is_one_line(command: Command, arguments: list[str], says: str) -> None:
    shown = command("plan", *arguments)
    assert shown.code == 2
    assert says in shown.err
    assert shown.err.count("\n") == 1


def test_a_model_is_counted_at_its_resolution_or_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ddpm(tmp_path / "model")
    monkeypatch.setenv("EXPUNGE_MODELS__MINE__SOURCE", str(folder))
    edit(folder / "unet" / "config.json", {"sample_size": None})
    shown = command("plan", "--model", "mine")
    assert shown.code == 2
    assert "unet/config.json: sample_size is null" in shown.err

    def activations(resolution: str) -> int:
        monkeypatch.setenv("EXPUNGE_MODELS__MINE__RESOLUTION", resolution)
        return command("plan", "--model", "mine", "--json").json["estimates"][0]["activations"]

    assert activations("[16, 16]") > 2 * activations("[8, 8]")
    edit(folder / "unet" / "config.json", {"norm_num_groups": 3})
    shown = command("plan", "--model", "mine")
    assert shown.code == 2
    assert "model mine" in shown.err
    assert shown.err.count("\n") == 1
