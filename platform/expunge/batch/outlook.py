"""When the requests that a night leaves in the queue are expected, and which due dates cannot be met."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta

from expunge.requests.queries import Expected
from expunge.text import counted


@dataclass(frozen=True)
class Outlook:
    """When those that were left in the queue are expected, if every night takes as many as tonight."""

    left: int
    per_night: int
    last: date | None
    """The night of the last of them; None if tonight took none."""
    late: int
    """How many will be decided after their due date."""
    nearest: date | None
    """The first due date that cannot be met."""

    def __str__(self) -> str:
        waits = f"{counted(self.left, 'request')} {'waits' if self.left == 1 else 'wait'} for a later night"
        if self.last is None:
            return waits
        said = f"{waits}: at {self.per_night:,} per night, the last is expected on {self.last}"
        if self.late:
            said += f"; WARNING: {counted(self.late, 'due date')} cannot be met, the first is {self.nearest}"
        return said


def outlook(waiting: Iterable[Expected], per_night: int, tonight: date) -> Outlook:
    """Look at what waits in the queue's order, one request at a time."""
    left, late, nearest, night = 0, 0, None, tonight
    for expected in waiting:
        if per_night:
            night = tonight + timedelta(days=1 + left // per_night)
        left += 1
        if expected.due is not None and (not per_night or expected.due < night):
            late += 1
            nearest = min(filter(None, (nearest, expected.due)))
    return Outlook(left, per_night, night if left and per_night else None, late, nearest)
