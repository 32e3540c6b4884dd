"""Triton's interpreter, at a third of its time: it would do the same again for every function called, type and shape.

It changes private parts of Triton 3.7; what comes out are the same numbers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def install() -> None:
    """Keep what does not change from one operation to the next."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_each_call"):
        return
    _patch_language_once()
    _remember_types()
    _remember_shapes()


def _patch_language_once() -> None:
    """Let each launch patch the language once; functions that its kernel calls find it patched."""
    from triton import language
    from triton.runtime import interpreter

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


def _remember_types() -> None:
    """It would check every sum of integers for overflow, and make a table of types whenever it looks one up."""
    from triton import language
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    look_up, known = interpreter._get_np_dtype, {}

    def remembered(dtype: Any) -> Any:
        name = str(dtype.element_ty if isinstance(dtype, language.block_type) else dtype)
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = remembered


def _remember_shapes() -> None:
    """It would wrap every number of every tensor's shape anew, name its type, and compare shapes number by number."""
    from triton.language import core
    from triton.runtime import interpreter

    semantic: Any = type(interpreter.interpreter_semantic)
    begin_block, broadcast = core.block_type.__init__, semantic.broadcast_impl_value
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    scalar = core.tuple([]), core.constexpr(1)

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *map(core._unwrap_if_constexpr, shape)
        if key not in blocks:
            begin_block(self, element_ty, shape)
            self.of_tensors = core.tuple([core.constexpr(s) for s in self.shape]), core.constexpr(self.numel)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else scalar

    def unless_alike(self: Any, lhs: Any, rhs: Any) -> Any:
        alike = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = block, tensor  # type: ignore[method-assign]
    semantic.broadcast_impl_value = unless_alike
