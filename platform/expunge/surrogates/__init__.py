"""Image editors that make the surrogate x_s of a target x_f: the same scene without the identity or the wrong detail.

Another editor is one module here that carries the editor's name: a class with its options and `@editor`.
"""

from expunge.surrogates.base import Editor, check_edit, editor_names, make_editor

__all__ = ["Editor", "check_edit", "editor_names", "make_editor"]
