"""`expunge bench method` compares the method with published controls on a testbed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from expunge.commands.common import AsJson, libraries_on_stderr, open_settings, print_error, print_json, print_rows
from expunge.commands.testbed import numbers
from expunge.errors import ExpungeError, InputError, StorageError

if TYPE_CHECKING:
    from expunge.bench.results import ArmResult
    from expunge.bench.running import Run
    from expunge.bench.summary import Row
    from expunge.settings import Settings

app = typer.Typer(help="Measure the method.", rich_markup_mode=None, no_args_is_help=True)

# Fewer unrelated samples cannot prove integrity, once those that show a target are left out.
QUICK_EVALUATION = {
    "seeds": 9,
    "generation_samples": 16,
    "integrity_samples": 48,
    "unseen_pictures": 16,
    "sampling_steps": 6,
    "robustness": "off",
}
QUICK_TRAINING = {"steps": 60, "retain_size": 64}


@app.callback()
def bench() -> None:
    """Measure the method."""


@app.command("method")
def method(
    testbed: Annotated[
        Literal["faces", "flags", "people"], typer.Option("--testbed", help="faces, flags or people.")
    ] = "faces",
    arms: Annotated[
        str, typer.Option("--arms", metavar="NAMES", help="Such as no-op,paper,ours (default: all that can run).")
    ] = "all",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs, each with a seed and requests of its own.")] = 3,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests per run, removed together.")] = 4,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="Where results are kept; run again, it goes on (default: .bench/TESTBED)."
        ),
    ] = None,
    oracle: Annotated[
        Path | None,
        typer.Option("--oracle", metavar="FOLDER", help="A model of `expunge testbed TESTBED --without NUMBERS`."),
    ] = None,
    without: Annotated[
        str, typer.Option("--without", metavar="NUMBERS", help="The same numbers; requests are drawn from them alone.")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few steps and samples: a try-out, not a measurement.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Tasks at once on a Ray of its own (default: one per core).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove the same requests with each arm at equal network passes, and judge them as a night does.

    It runs on the Ray cluster that RAY_ADDRESS names, whose nodes must share --out, or else on a Ray of its own.
    Exit 1 if an arm failed; the others are still measured.
    """
    if (oracle is None) != (not without):
        raise InputError("--oracle and --without belong together", hint="name the model, and what it never saw")
    settings = open_settings()
    settings = _quick(settings, testbed) if quick else settings
    with libraries_on_stderr():
        run, chosen = _open(settings, testbed, arms, seeds, requests, out or Path(".bench") / testbed, oracle, without)
        failures = _run(run, chosen, workers)
        results, rows = _keep(run, chosen)
    if as_json:
        print_json(
            {
                "folder": str(run.folder),
                "results": [result.model_dump() for result in results],
                "failures": [{"arm": a, "group": g, "error": str(e)} for (a, g), e in failures.items()],
            }
        )
    else:
        _print(rows)
        typer.echo(f"written to {run.folder}: results.jsonl, table.md, pareto.png, pareto.svg")
        for (arm, group), error in failures.items():
            typer.echo(f"{arm}, run {group}:", err=True)
            print_error(error, as_json=False)
    if failures:
        raise typer.Exit(ExpungeError.exit_code)


def _quick(settings: "Settings", testbed: str) -> "Settings":
    from expunge.settings import EvaluationSettings, TrainingSettings

    model = settings.model(testbed)
    changed = model.model_copy(update={"training": {**model.training, **QUICK_TRAINING}})
    evaluation = {**settings.evaluation.model_dump(), **QUICK_EVALUATION}
    TrainingSettings.model_validate({**settings.training.model_dump(), **changed.training})
    return settings.model_copy(
        update={
            "models": {**settings.models, testbed: changed},
            "evaluation": EvaluationSettings.model_validate(evaluation),
        }
    )


def _open(
    settings: "Settings",
    testbed: str,
    arms: str,
    seeds: int,
    requests: int,
    out: Path,
    oracle: Path | None,
    without: str,
) -> tuple["Run", list[str]]:
    """Check everything that was asked for before anything is computed."""
    from expunge.bench.arms import choose_arms
    from expunge.bench.cases import POOLS, draw_groups
    from expunge.bench.running import Run
    from expunge.families import preflight

    pool = POOLS[testbed]()
    chosen = choose_arms(arms, prompts=bool(pool.prompts), oracle=oracle is not None)
    groups = draw_groups(pool, seeds, requests, numbers(without))
    if oracle is not None:
        retrained = settings.model(testbed).model_copy(update={"source": str(oracle), "revision": ""})
        preflight("--oracle", retrained)
    run = Run.of(out, settings, testbed, groups, oracle.absolute() if oracle else None)
    try:
        run.begin()
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror})", hint="name another --out") from error
    return run, chosen


def _run(run: "Run", arms: list[str], workers: int | None) -> dict[tuple[str, int], ExpungeError]:
    """Run what is left, with a bar, and return why some have no result."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from expunge.bench.running import run_all

    failures: dict[tuple[str, int], ExpungeError] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(run.testbed, total=len(arms) * len(run.groups))

        def done(arm: str, group: int, error: ExpungeError | None) -> None:
            if error is not None:
                failures[arm, group] = error
            progress.update(bar, advance=1, description=f"{run.testbed}: {arm}")

        run_all(run, arms, done, workers)
    return failures


def _keep(run: "Run", arms: list[str]) -> tuple[list["ArmResult"], list["Row"]]:
    """Write the results as JSON lines, a table and plots beside them."""
    from expunge.bench.plot import pareto
    from expunge.bench.results import read_results
    from expunge.bench.summary import as_markdown, summarise
    from expunge.files import write_atomically

    results = read_results(run.folder, arms, len(run.groups))
    rows = summarise(results)
    title = f"{run.testbed}: {len(run.groups)} x {len(run.groups[0])} requests"
    try:
        write_atomically(run.folder / "results.jsonl", "".join(f"{each.model_dump_json()}\n" for each in results))
        write_atomically(run.folder / "table.md", as_markdown(rows))
        for kind in ("png", "svg"):
            write_atomically(run.folder / f"pareto.{kind}", pareto(rows, title, kind))
    except OSError as error:
        raise StorageError(f"{run.folder} cannot be written ({error.strerror})", hint="free space") from error
    return results, rows


def _print(rows: list["Row"]) -> None:
    from expunge.bench.summary import COLUMNS, cells

    print_rows(COLUMNS, map(cells, rows))
