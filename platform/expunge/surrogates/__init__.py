"""Image editors that make the surrogate x_s of a target x_f: the same scene without the identity or the wrong detail.

To add an editor, add a module with its name here, and decorate its factory with `register`.
"""

from expunge.surrogates.base import Editor, check_edit, editor_names, make_editor, read_options, register

__all__ = ["Editor", "check_edit", "editor_names", "make_editor", "read_options", "register"]
