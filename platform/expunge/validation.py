"""Turns pydantic's errors into InputError: the field, what is wrong with it, and a hint; never the value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from expunge.errors import InputError

_LONGEST_NAME = 50

_PLAIN: Mapping[str, str] = {
    "string_unicode": "it is not text: a character in it is half of a pair",
    "tuple_type": "give a list",
    "dict_type": 'give an object: {"name": "value"}',
    "model_type": 'give an object: {"name": "value"}',
}
"""What to say instead of pydantic's own words, where those only make sense to a Python programmer."""


@dataclass(frozen=True)
class Problem:
    """The first thing that is wrong: the path of its field, and pydantic's name for the kind of error."""

    path: tuple[str, ...]
    kind: str

    @property
    def is_unknown(self) -> bool:
        """True where no field has this name."""
        return self.kind == "extra_forbidden"


def input_error(
    error: ValidationError,
    *,
    prefix: str = "",
    where: Sequence[str] = (),
    noun: str = "field",
    names: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
    hint: Callable[[Problem], str | None] = lambda _: None,
) -> InputError:
    """An InputError that names the first thing that is wrong, and how many more there are.

    prefix: comes before the name, as "setting ". where: the path of what was validated, if it is a part of something.
    noun: what a field is called here. names: what to call these fields instead, without the prefix. words: what to say
    about a pattern or a kind of error of pydantic's. hint: makes the hint.
    """
    first, *more = error.errors(include_url=False, include_input=False)
    problem = Problem((*where, *(_short(part) for part in first["loc"] if part != "[key]")), first["type"])
    said = f"there is no such {noun}" if problem.is_unknown else _said(first, words or {})
    also = f" (and {len(more)} more)" if more else ""
    path = ".".join(problem.path)
    name = (names or {}).get(path, f"{prefix}{path}")
    return InputError(f"{name}: {said}{also}" if path else f"{said}{also}", hint=hint(problem))


def _said(error: ErrorDetails, words: Mapping[str, str]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("too_short", "too_long"):
        few = kind == "too_short"
        return f"give at {'least' if few else 'most'} {context['min_length' if few else 'max_length']}"
    known = {**_PLAIN, **words}
    return known.get(context.get("pattern", kind)) or error["msg"].removeprefix("Value error, ")


def _short(part: str | int) -> str:
    """An unknown name may be somebody's whole prompt; its beginning is enough."""
    text = str(part)
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
