"""`expunge testbed` trains one of the test models again, or an oracle that never saw some of its pictures."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from expunge.commands.common import AsJson, hush_libraries, one_line, print_json
from expunge.errors import InputError, StorageError

Name = Annotated[Literal["faces", "flags", "people"], typer.Argument(metavar="NAME", help="faces, flags or people.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="Where the model is saved (default: a folder of its own in --work)."),
]
Work = Annotated[
    Path, typer.Option("--work", metavar="FOLDER", help="Where checkpoints are kept; a killed run resumes from there.")
]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Fewer steps, for a try-out (default: the recipe's).")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Another seed makes another model.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (default: torch's own choice).")]
Without = Annotated[
    str,
    typer.Option(
        "--without",
        metavar="NUMBERS",
        help="Train an oracle that never sees these faces, flags or people, counted from 0, such as 3,16-23.",
    ),
]


def train_testbed(
    name: Name,
    out: Out = None,
    work: Work = Path(".testbed"),
    steps: Steps = None,
    seed: Seed = 0,
    threads: Threads = None,
    without: Without = "",
    as_json: AsJson = False,
) -> None:
    """Train a test model on the CPU, in an hour or two. The shipped one stays unless --out names its folder."""
    gone = numbers(without)
    hush_libraries()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    recipe = import_module(f"expunge.testbed.{name}")
    try:
        for folder in filter(None, (work, out)):
            folder.mkdir(parents=True, exist_ok=True)  # fails now rather than after hours
        saved: Path = recipe.run(out, work, steps, seed, gone)
    except OSError as error:
        raise StorageError(f"the model cannot be kept ({error})", hint="name another --out or --work") from None
    print_json({"model": name, "path": str(saved)}) if as_json else typer.echo(one_line(saved))


def numbers(text: str) -> list[int]:
    """Read numbers and ranges such as `3,16-23`, in order. Raises InputError."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.strip().partition("-")
        try:
            run = range(int(first), int(last or first) + 1)
            if not run:
                raise ValueError
            found.update(run)
        except ValueError:
            raise InputError(f"--without: {part!r} is no number or range", hint="write it as 3,16-23") from None
    return sorted(found)
