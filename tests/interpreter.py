"""Makes Triton's interpreter twice as fast, in each process that imports this module.

At every call of a device function the interpreter looks through `triton.language` for the functions
to replace by its own. The first call for a module or class replaces them all, so here it is the
only one, and the interpreter's functions stay.
"""

from __future__ import annotations

import functools
import os

if os.environ.get("TRITON_INTERPRET"):
    from triton.runtime import interpreter

    patch = interpreter._patch_builtin

    @functools.cache
    def patch_for_good(module_or_class: object) -> None:
        patch(module_or_class, interpreter.interpreter_builder, interpreter._LangPatchScope())

    interpreter._patch_builtin = lambda module_or_class, *_: patch_for_good(module_or_class)
