"""The format version of a night's files, and the functions that read files of earlier releases.

A night's folder states its format in `format.json`; without that file it has format 1, which release 0.1.0 wrote. Files
of every format up to FORMAT can be read, and are never converted; new files have FORMAT. A new field with a default
needs no new format: a file without it is read with the default. A field that is renamed, moved or removed needs a new
format, and a function here that reads the old file.

Formats 1 and 2 are in the clear; since format 3, every file but `format.json` and `progress.json` is sealed, and older
ones are sealed together with the database, their content as it was.

Format 1 also differs as follows: jobs have no id, `outcome.json` and `night.json` hold copies of everything that they
are assembled from, `prepared.json` calls `unrelated_prompts` `retain_rows`, and the jobs' training settings and
`mode.json` have the names that `expunge.settings.RENAMED` translates.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from expunge.errors import StorageError
from expunge.files import write_atomically
from expunge.runs.outcomes import JobEnd, NightEnd, NightOutcome, NightPlan
from expunge.settings import RENAMED, TrainingSettings
from expunge.types import CHAMPION, GradientMode, Hotfix, PreparedJob, UnlearnJob

FORMAT = 3
FILE = "format.json"


def check_format(night: Path) -> None:
    """Raise StorageError if a night's folder has a newer format, or its format cannot be read."""
    path = night / FILE
    data = read_file(path)
    if data is None:
        return
    try:
        found = int(json.loads(data)["format"])
    except (ValueError, KeyError, TypeError):
        raise StorageError(
            f"{path} is damaged", hint="delete it if no release of expunge newer than this one has run the batch"
        ) from None
    if found > FORMAT:
        raise StorageError(
            f"{night} was written in format {found}, and this release reads formats up to {FORMAT}",
            hint="upgrade expunge here to the release that has run the batch",
        )


def read_file(path: Path) -> bytes | None:
    """Return the content of a night's file, or None if there is none. Raises StorageError if the disk fails."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})", hint="check the disk, then repeat") from None


def mark_format(night: Path) -> None:
    """Record that new files have FORMAT. Raises StorageError as `check_format` does, and OSError."""
    check_format(night)
    document = json.dumps({"format": FORMAT})
    if not (night / FILE).exists() or (night / FILE).read_text() != document:
        write_atomically(night / FILE, document)


def read_job(data: bytes, id: str) -> UnlearnJob:
    """Parse `job.json` of the job whose folder is named `id`. Raises NOT_UNDERSTOOD, as all readers here do."""
    return _job(from_json(data), id)


def read_plan(data: bytes) -> NightPlan:
    """Parse `plan.json`, whose jobs have no ids in format 1."""
    content = from_json(data)
    jobs = content["jobs"]
    ids = _ids_in(data) if any("id" not in job for job in jobs) else [job["id"] for job in jobs]
    content["jobs"] = [_job(job, id) for job, id in zip(jobs, ids, strict=True)]
    return NightPlan.model_validate(content)


def read_prepared(data: bytes) -> PreparedJob:
    """Parse `prepared.json`, in which format 1 has another name for `unrelated_prompts`."""
    content = from_json(data)
    if "retain_rows" in content:
        content["unrelated_prompts"] = content.pop("retain_rows")
    return PreparedJob.model_validate(content)


def read_mode(data: bytes) -> GradientMode:
    """Parse `mode.json`, in which format 1 has another name for `objectives`."""
    return GradientMode.model_validate(_renamed(from_json(data)))


def read_hotfix(data: bytes, weights: Path) -> Hotfix:
    """Parse `hotfix.json`. Its path is replaced by `weights`, because the home may have been moved."""
    return Hotfix.model_validate({**from_json(data), "path": weights})


def read_end(data: bytes) -> JobEnd:
    """Parse `outcome.json`, which in format 1 holds the job's whole outcome."""
    content = from_json(data)
    if "job" in content:
        version = content.get("version") or {}
        content = {
            "error": content.get("error"),
            "outdated": content.get("outdated", False),
            "promoted": CHAMPION in version.get("aliases", []),
        }
    return JobEnd.model_validate(content)


def read_night(data: bytes) -> NightEnd | NightOutcome:
    """Parse `night.json`, which in format 1 holds the whole outcome."""
    content = from_json(data)
    if "outcomes" not in content:
        return NightEnd.model_validate(content)
    ids = _ids_in(data)
    content["jobs"] = [_job(job, id) for job, id in zip(content["jobs"], ids, strict=True)]
    for outcome, id in zip(content["outcomes"], ids, strict=True):
        outcome["job"] = _job(outcome["job"], id)
    return NightOutcome.model_validate(content)


def read_training(content: dict[str, Any]) -> TrainingSettings:
    """Parse training settings of this release or an earlier one, as a registered version states them."""
    return TrainingSettings.model_validate(_renamed(content))


def _job(content: dict[str, Any], id: str) -> UnlearnJob:
    return UnlearnJob.model_validate({"id": id, **content, "training": _renamed(content["training"])})


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """Give settings of `[training]` the names of this release."""
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def _ids_in(data: bytes) -> list[str]:
    """Compute the job ids of a plan or night of format 1 as release 0.1.0 did, from the text of their JSON.

    Parsing and writing the JSON again could change it, for example the digits of a number or new fields' defaults.
    """
    text, key = data.decode(), '"jobs":['
    at, ids, decoder = text.index(key) + len(key), [], json.JSONDecoder()
    while text[at] != "]":
        job, end = decoder.raw_decode(text, at)
        ids.append(f"{job['model']}-{hashlib.sha256(text[at:end].encode()).hexdigest()[:16]}")
        at = end + (text[end] == ",")
    return ids
