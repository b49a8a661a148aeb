"""A removal request as a person writes it, on the command line or in a file, and the rules for its fields."""

import json
import re
import unicodedata
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from expunge.errors import InputError
from expunge.requests.box import Box, one_or_more
from expunge.requests.locations import Picture
from expunge.settings import IDENTIFIER, IDENTIFIER_RULE
from expunge.types import EXTERNAL_ID, TEXT, ExternalId, Identifier, Text
from expunge.validation import Problem, input_error

Model = TypeVar("Model", bound=BaseModel)

# A comma ends an option only where another KEY= follows: an instruction may be a sentence with commas.
_OPTION = re.compile(r",(?=[A-Za-z_][A-Za-z0-9_-]*=)")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


_WORDS = {
    "model_type": 'give an object: {"editor": "blend"}',
    IDENTIFIER: IDENTIFIER_RULE,
    EXTERNAL_ID: "it holds a control character: leave it out",
    TEXT: "it holds a control character: leave it out",
}
"""Plain words for a pattern that does not match, or for one of pydantic's kinds of error."""


def _option_text(value: object) -> object:
    """Options are text, but JSON may hold a number, true or false in their place."""
    if isinstance(value, dict):
        return {k: json.dumps(v) if isinstance(v, bool | int | float) else v for k, v in value.items()}
    return value


def _parsed(value: object) -> object:
    return parse_edit(value) if isinstance(value, str) else value


def _list_of_paths(value: object) -> object:
    if isinstance(value, str | Path):
        raise ValueError('give a list, even of one: ["a.png"]')
    return value


def _day(value: object) -> object:
    """Takes only YYYY-MM-DD: pydantic would also make dates of numbers and times."""
    if isinstance(value, str) and _DAY.fullmatch(value):
        return value
    if value is None or (isinstance(value, date) and not isinstance(value, datetime)):
        return value
    raise ValueError("Input should be a valid date, written YYYY-MM-DD")


def _named(value: str | None) -> str | None:
    if value is not None and not 1 <= len(canonical(value)) <= 200:
        raise ValueError("String should have 1 to 200 characters, spaces at its ends not counted")
    return value


Pictures = Annotated[tuple[Picture, ...], BeforeValidator(_list_of_paths)]


class EditInput(BaseModel):
    """An edit as a person writes it: the mask is still a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    editor: Identifier
    mask: Picture | None = None
    options: Annotated[dict[Text, Text], BeforeValidator(_option_text)] = Field(default_factory=dict)


class Submission(BaseModel):
    """One removal request as a person writes it: pictures are paths or URLs, and an edit may be text."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model: Identifier
    images: Pictures = Field(min_length=1, max_length=64)
    box: Annotated[tuple[Box, ...], BeforeValidator(one_or_more)] = Field(
        (), description="left, top, right, bottom of what counts: one for all images, or one for each"
    )
    prompt: Text | None = None
    surrogates: Pictures = ()
    edit: Annotated[EditInput | None, BeforeValidator(_parsed)] = None
    external_id: Annotated[ExternalId | None, AfterValidator(_named)] = Field(
        None, description="the requester's own id; default: a hash of the content"
    )
    reason: Text = ""
    due: Annotated[date | None, BeforeValidator(_day)] = None
    priority: int = Field(0, ge=-10, le=10, strict=True)

    @model_validator(mode="after")
    def _one_way_to_a_surrogate(self) -> Self:
        if self.surrogates and self.edit is not None:
            raise ValueError("surrogates and edit exclude each other: keep one of them")
        if len(self.surrogates) not in (0, len(self.images)):
            message = (
                f"{len(self.surrogates)} surrogates for {len(self.images)} images: give one for each image, or none"
            )
            raise ValueError(message)
        if len(self.box) not in (0, 1, len(self.images)):
            message = f"{len(self.box)} boxes for {len(self.images)} images: give one for all, one for each, or none"
            raise ValueError(message)
        return self


def canonical(external_id: str) -> str:
    """Returns the canonical form of an external id: composed characters (NFC), and no spaces at its ends."""
    return unicodedata.normalize("NFC", external_id).strip()


def parse_edit(text: str) -> EditInput:
    """Reads `EDITOR[:key=value,...]`; `mask=FILE` names a picture, white where the edit goes. Raises InputError."""
    editor, _, rest = text.partition(":")
    options: dict[str, str] = {}
    for number, part in enumerate(_OPTION.split(rest) if rest else (), start=1):
        key, equals, value = part.partition("=")
        if not equals or not key or key in options:
            why = "is given twice" if key in options else "is not key=value"
            # Not quoted: it may be a part of what describes a person.
            raise InputError(f"edit: option {number} {why}", hint="write EDITOR:key=value,key=value")
        options[key] = value
    mask = options.pop("mask", None)
    return validated(EditInput, {"editor": editor, "mask": mask, "options": options}, where=("edit",))


def validated(kind: type[Model], values: object, *, where: tuple[str, ...] = ()) -> Model:
    """Returns `values`, which lie at `where` in a submission, as a `kind`. Raises InputError naming the field."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:

        def hint(problem: Problem) -> str | None:
            return f"the fields are {', '.join(kind.model_fields)}" if problem.is_unknown else None

        raise input_error(error, where=where, words=_WORDS, hint=hint) from None
