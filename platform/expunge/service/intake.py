"""From a form to accepted requests, over the intake that the command line uses: no second implementation."""

import re
from pathlib import Path

from expunge.errors import InputError
from expunge.preparation.checking import SubmitCheck
from expunge.requests.blobs import BlobStore
from expunge.requests.intake import accept
from expunge.requests.lines import accept_uploaded
from expunge.requests.store import RequestStore
from expunge.requests.submission import Submission, parse_edit, validated
from expunge.requests.uploads import Uploads
from expunge.service.forms import Form
from expunge.service.problems import presentable
from expunge.service.schemas import Accepted, AcceptedLines, Line
from expunge.settings import Settings

ONCE = ("model", "prompt", "edit", "external_id", "reason", "due", "priority")
PICTURES = ("images", "surrogates", "mask")
LINES = "requests"
"""The part of a batch that holds its lines."""


def accept_one(form: Form, settings: Settings, store: RequestStore, blobs: BlobStore) -> tuple[Accepted, bool]:
    """Accepts one request; False: it was known. Raises InputError naming the field, and the stores' errors."""
    values, files = _values(form)
    submission = validated(Submission, values)
    check = SubmitCheck(settings)
    _check_model(submission.model, settings)
    record, new = accept(submission, settings=settings, store=store, blobs=blobs, base=Uploads(files), check=check)
    notes = check.take_notes()
    return Accepted(id=record.request.id, new=new, state=record.state, due=record.due, notes=notes), new


def accept_many(form: Form, settings: Settings, store: RequestStore, blobs: BlobStore) -> AcceptedLines:
    """Accepts lines, each on its own. They name pictures by the file names of the uploads beside them.

    Raises InputError if the lines cannot be read at all, or two uploads have one name.
    """
    lines = [upload.data for upload in form.uploads if upload.field == LINES]
    lines += [value.encode() for name, value in form.fields if name == LINES]
    if len(lines) != 1 or len(form.fields) + len(form.uploads) != 1 + sum(u.field == "files" for u in form.uploads):
        raise InputError(f"{LINES}: give it once, and pictures as files", hint="other parts are not known here")
    pictures = [upload for upload in form.uploads if upload.field == "files"]
    uploads = Uploads({Path(upload.name).as_posix(): upload.data for upload in pictures})
    if len(uploads.files) < len(pictures):
        raise InputError("files: two have the same name", hint="give each picture a file name of its own")
    check, told = SubmitCheck(settings), []
    for result in accept_uploaded(lines[0], uploads, settings=settings, store=store, blobs=blobs, check=check):
        error, hint = (text and presentable(text) for text in (result.error, result.hint))
        notes = check.take_notes()
        told.append(Line(line=result.line, id=result.id, new=result.new, error=error, hint=hint, notes=notes))
    refused, new = sum(line.id is None for line in told), sum(line.new for line in told)
    return AcceptedLines(accepted=new, known=len(told) - new - refused, refused=refused, lines=told)


def _values(form: Form) -> tuple[dict[str, object], dict[str, bytes]]:
    """Returns the fields of a submission, and its pictures by names made here: a file's own name is never used."""
    values: dict[str, object] = {}
    for name, text in form.fields:
        if name == "box":
            values[name] = (*_tuple(values.get(name)), text)
        elif name not in ONCE:
            why = "is not a file" if name in PICTURES else "there is no such field"
            raise InputError(f"{name[:50]}: {why}", hint=f"the fields are {', '.join((*ONCE, 'box', *PICTURES))}")
        elif name in values:
            raise InputError(f"{name} is given twice", hint="keep one of them")
        else:
            values[name] = _whole(text) if name == "priority" else text
    files: dict[str, bytes] = {}
    for upload in form.uploads:
        if upload.field not in PICTURES:
            raise InputError(f"{upload.field[:50]}: no picture is expected there", hint=f"use {', '.join(PICTURES)}")
        name = f"{upload.field}-{len(files)}"
        files[name] = upload.data
        values[upload.field] = (*_tuple(values.get(upload.field)), Path(name))
    _with_mask(values)
    return values, files


def _with_mask(values: dict[str, object]) -> None:
    masks, edit = _tuple(values.pop("mask", None)), values.get("edit")
    if len(masks) > 1 or (masks and not isinstance(edit, str)):
        raise InputError("mask: give one, and only with edit", hint="name the editor: edit=blend")
    if isinstance(edit, str):
        parsed = parse_edit(edit)
        if parsed.mask is not None:
            raise InputError("edit: a mask is a file here", hint="upload it as mask")
        values["edit"] = parsed.model_copy(update={"mask": masks[0]}) if masks else parsed


def _check_model(name: str, settings: Settings) -> None:
    """Refuses an unknown model in words for a caller, who cannot change the config file."""
    if name not in settings.models:
        raise InputError("model: there is none of this name", hint=f"use one of {', '.join(sorted(settings.models))}")


def _whole(text: str) -> object:
    """A form has no numbers: what is none is left for the field's own rule to refuse."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,3}", text) else text


def _tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()
