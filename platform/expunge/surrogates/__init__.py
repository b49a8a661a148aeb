"""Image editors that make the surrogate x_s of a target x_f: the same scene without the identity or the wrong detail.

Another editor is one file here, named as the editor and decorated with `register`.
"""

from expunge.surrogates.base import Editor, check_edit, editor_names, make_editor, read_options, register

__all__ = ["Editor", "check_edit", "editor_names", "make_editor", "read_options", "register"]
