"""Where settings come from: the config file and the environment. What cannot be read is refused, never ignored.

A misspelt gate must not silently become the default gate.
"""

import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin
from urllib.parse import urlsplit

import platformdirs
from pydantic import BaseModel, ValidationError, ValidatorFunctionWrapHandler
from pydantic.fields import FieldInfo

from expunge.errors import InputError
from expunge.validation import Problem, input_error

PREFIX, NESTED = "EXPUNGE_", "__"

# Kubernetes sets these in every pod for a service whose name begins with `expunge-`; EXPUNGE_TEST_* is for the tests.
_NOT_OURS = re.compile(r".+_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_\w+)?)|TEST_.+")

_ENDS_A_HOST = re.compile(r"[/?#\[\]]")

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"})
"""URL schemes without a place for a key: fsspec would take it for a part of the bucket's name."""


def config_file() -> Path:
    """Return the config file that would be read. The one in the home need not exist."""
    home = expanded(Path(os.environ.get("EXPUNGE_HOME") or platformdirs.user_data_dir("expunge")))
    return expanded(Path(os.environ.get("EXPUNGE_CONFIG") or home / "config.toml"), "config")


def expanded(path: Path, setting: str = "home") -> Path:
    """Return `path` with its `~` expanded. Raises InputError if there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise InputError(f"{setting}: {path} names no user of this machine", hint="write the full path") from None


def read_config() -> dict[str, object]:
    """Return the config file's tables. Raises InputError naming the file, and the line if its content is wrong."""
    file = config_file()
    try:
        if not stat.S_ISREG(file.stat().st_mode) and str(file) != os.devnull:
            raise InputError(f"config: {file} is not a regular file", hint="name a TOML file with EXPUNGE_CONFIG")
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if os.environ.get("EXPUNGE_CONFIG"):
            hint = "create it, or unset EXPUNGE_CONFIG to use the one in the home"
            raise InputError(f"config: {file} does not exist", hint=hint) from None
        if file.is_symlink():
            raise InputError(
                f"config: {file} is a link to a file that does not exist", hint="correct the link"
            ) from None
        return {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"config: {file} cannot be read ({reason})", hint="check its permissions") from None
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"config: {file}: line {line} is not UTF-8", hint="save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"config: {file} is not TOML: {error}", hint="correct that line") from None


def check_variables(settings: type[BaseModel]) -> None:
    """Raises InputError for an `EXPUNGE_*` variable that sets nothing."""
    fields = settings.model_fields
    for name in sorted(os.environ):
        if not name.upper().startswith(PREFIX):
            continue
        rest = name.upper().removeprefix(PREFIX)
        head, nested, _ = rest.partition(NESTED)
        field = fields.get(head.lower())
        if (field is None or (nested and not _is_table(field))) and not _NOT_OURS.fullmatch(rest):
            known = [_variable(path.split(".")) for path in setting_names(settings)]
            hint = did_you_mean(name.upper(), known) or "unset it, or correct its name"
            raise InputError(f"the environment variable {name} is not a setting", hint=hint)


def refused(
    error: ValidationError, where: Sequence[str], known: Collection[str], renamed: Mapping[str, str]
) -> InputError:
    """Describe the first wrong setting of `error`, found under `where`.

    known: the names that exist. renamed: the new name of each that has had another, as "table.setting".
    """

    def hint(problem: Problem) -> str:
        see = f"see {_variable(problem.path)} and {config_file()}"
        old = ".".join(problem.path[-2:])
        if problem.is_unknown and old in renamed:
            return f"{old} is now {renamed[old]}; {see}"
        if problem.is_unknown:
            close = did_you_mean(problem.path[-1], {each.rpartition(".")[2] for each in known})
            return f"{close} {see}".strip()
        if problem.kind in ("tuple_type", "dict_type", "model_type"):
            return f'write a list as ["a", "b"] and a table as {{"a": 1}}; {see}'
        return see

    return input_error(error, prefix="setting ", where=where, noun="setting", hint=hint)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else ""


def setting_names(kind: type[BaseModel]) -> list[str]:
    """Return the names of all settings of `kind`, such as `training` and `training.steps`."""
    names = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        names.append(name)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += [f"{name}.{rest}" for rest in setting_names(inner)]
    return names


def is_optional(kind: type[BaseModel], field: str | None) -> bool:
    return NoneType in get_args(kind.model_fields[field or ""].annotation)


def _is_table(field: FieldInfo) -> bool:
    kind = field.annotation
    return get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel))


def _variable(path: Sequence[str]) -> str:
    """Return the name of the variable for `path`. A list has one variable for all its items."""
    return PREFIX + NESTED.join(part for part in path if not part.isdigit()).upper()


def as_written(value: object, handler: ValidatorFunctionWrapHandler, *, optional: bool) -> object:
    """Return `value` as its field's type. Text that the field refuses is tried again as the JSON that it spells.

    Thus "1" can be one of the numbers of a Literal, and "3.2e+07", as Helm prints it, an integer. A truth value is not
    accepted as a number, although pydantic would read `true` as 1.
    """
    if isinstance(value, bool):
        taken = handler(value)
        if taken is not value:
            raise ValueError("it must not be true or false")
        return taken
    if not isinstance(value, str):
        return handler(value)
    if optional and value.strip() in ("", "null"):
        return None
    try:
        return handler(value)
    except ValidationError:
        spelt = _spelt(value)
        if spelt is None:
            raise
    return handler(spelt)


def _spelt(text: str) -> object:
    """Return the number, list or object that `text` spells, and None for anything else."""
    try:
        value = from_json(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | float | list | dict) and not isinstance(value, bool) else None


def from_json(text: str) -> object:
    """Raises ValueError for what is not JSON, and InputError for a table that sets one name twice, as TOML does."""
    return json.loads(text, object_pairs_hook=_table)


def _table(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table: dict[str, object] = {}
    for name, value in pairs:
        if name in table:
            raise InputError(f"the setting {name[:50]!r} is given twice in one variable", hint="keep one of them")
        table[name] = value
    return table


def check_url(url: str, *, database: bool = False) -> str:
    """Return the URL. Raises ValueError if its password cannot be told from the rest, as errors might then show it.

    The password in a `database` URL may hold slashes, because SQLAlchemy allows that.
    """
    scheme, slashes, rest = url.partition("://")
    if not slashes or (rest.startswith("/") and "?" not in rest):  # a path
        return url
    if re.search(r"[\s\x00-\x1f]", url) and re.search("[@?]", url):
        raise ValueError("it contains white space: percent-encode it (a space is %20)")
    user, colon, tail = rest.partition(":")
    server = rest
    if colon and "@" in tail and not _ENDS_A_HOST.search(user):
        password, _, server = tail.partition("@")
        if "@" in server or (_ENDS_A_HOST.search(password) and not database):
            raise ValueError("it is unclear where its password ends: write an @ in it as %40 and a / as %2F")
        if scheme in OBJECT_STORES:
            raise ValueError(
                "it contains a key: leave it out, and set AWS_ACCESS_KEY_ID or whatever variable its driver reads"
            )
    elif scheme.startswith("http") and "@" in rest and _ENDS_A_HOST.search(rest.partition("@")[0]):
        raise ValueError("it is unclear where its token ends: write an @ in it as %40 and a / as %2F")
    try:
        _ = urlsplit(f"x://{server}").port
    except ValueError:
        raise ValueError("its host or port is malformed") from None
    return url
