"""Triton's interpreter, at a third of its time: it would do the same again for every function called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def install() -> None:
    """Let each launch patch the language once; functions that its kernel calls find it patched."""
    from triton import language
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_each_call"):
        return
    interpreter._patch_each_call = patch = interpreter._patch_lang  # type: ignore[attr-defined]
    everything: Any = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    running: list[Any] = []

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc]
        """The language as it is while a launch runs."""

        def restore(self) -> None:
            running.clear()
            super().restore()

    def patch_once(function: Any) -> Any:
        if running:
            return interpreter._LangPatchScope()
        patched, scope = patch(everything), Scope()
        scope.__dict__.update(patched.__dict__)
        running.append(scope)
        return scope

    interpreter._patch_lang = patch_once
    # It would check every sum of integers for overflow, and make a table of types whenever it looks one up.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    look_up, known = interpreter._get_np_dtype, {}

    def remembered(dtype: Any) -> Any:
        name = str(dtype.element_ty if isinstance(dtype, language.block_type) else dtype)
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = remembered
