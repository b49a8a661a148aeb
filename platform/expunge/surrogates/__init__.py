"""Image editors that make the surrogate x_s of a target x_f: the same scene without the identity or the wrong detail.

To add an editor, add a module with its name here: its options, and a class that is decorated with `editor`.
"""

from expunge.surrogates._attempts import ATTEMPTS, Judge, Judging, Studio, Verdict
from expunge.surrogates._painter import Painter
from expunge.surrogates.base import Editor, Task, check_edit, editor_names, make_editor

__all__ = [
    "ATTEMPTS",
    "Editor",
    "Judge",
    "Judging",
    "Painter",
    "Studio",
    "Task",
    "Verdict",
    "check_edit",
    "editor_names",
    "make_editor",
]
