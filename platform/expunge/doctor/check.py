"""One row of the doctor's answer."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice

from expunge.errors import ExpungeError
from expunge.text import masked_quote

NOT_YET = "made with the first request"


@dataclass(frozen=True)
class Check:
    """`found` says what is there, and `hint` what to do if it is not ok. A night can do without what is not
    `required`."""

    name: str
    ok: bool
    found: str
    hint: str = ""
    required: bool = True

    @property
    def status(self) -> str:
        return "ok" if self.ok else "failed" if self.required else "warning"

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "status": self.status}


def guarded(name: str, rows: Callable[[], list[Check]]) -> list[Check]:
    """The rows, or one that says what went wrong: nothing raises."""
    try:
        return rows()
    except ExpungeError as error:
        return [failed(name, error)]
    except ImportError as error:
        return [Check(name, False, str(error), "install what is missing above")]
    except OSError as error:
        return [Check(name, False, masked_quote(str(error)), "check the path, its permissions and the free space")]
    except Exception as error:  # the last line of defence: one row must not take the others along
        found = f"{type(error).__name__}: {masked_quote(str(error))}"
        return [Check(name, False, found, "check the settings of this row with `expunge config show`")]


def failed(name: str, error: ExpungeError) -> Check:
    return Check(name, False, error.message, error.hint or "")


def some(ids: Iterable[str]) -> str:
    """The first three, and dots if there are more."""
    first = [*islice(ids, 4)]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
