"""The forms in which kernels are shipped: what is compiled, for which sizes, with how many warps and stages.

A test compiles forms without a GPU and reads registers, spills and shared memory; `benchmarks/kernels.py` writes all of
them as a table. Importing this imports no Triton; `shipped` and `fingerprint` do.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PACKAGE = "ttt.ops.triton"
INTERPRETED = "_INTERPRETED"
"""The global constant that tells a kernel whether it is interpreted; what is compiled is not."""


@dataclass(frozen=True)
class Form:
    """One specialisation of a kernel."""

    name: str
    """For people, such as `linear forward, F 64, C 16, causal`."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Triton's type of each parameter that is no constant: `*fp32`, `i32`, `fp32`, …"""
    constants: Mapping[str, Any]
    """The value of each `tl.constexpr` parameter."""
    num_warps: int = 4
    num_stages: int = 2
    spilled_bytes: int | Mapping[int, int] = 0
    """The most bytes a thread may spill to memory: everywhere, or by architecture, such as `{80: 768}`; else none."""
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Parameters that are always multiples of 16 (pointers, strides)."""

    def may_spill(self, arch: int) -> int:
        """The most bytes a thread may spill on an architecture: 80, 90 or 100."""
        return self.spilled_bytes if isinstance(self.spilled_bytes, int) else self.spilled_bytes.get(arch, 0)


def modules(package: str = PACKAGE) -> list[Any]:
    """The modules of a package that hold kernels: those with a function `forms`."""
    root = importlib.import_module(package)
    found = [importlib.import_module(f"{package}.{each.name}") for each in pkgutil.iter_modules(root.__path__)]
    return [module for module in found if hasattr(module, "forms")]


def shipped(package: str = PACKAGE) -> dict[str, Form]:
    """Every form of every module, by name.

    Raises:
        ValueError: two forms have one name.
    """
    found: dict[str, Form] = {}
    for module in modules(package):
        for form in module.forms():
            if form.name in found:
                raise ValueError(f"two forms are called {form.name}; a form's name says how it differs from all others")
            found[form.name] = form
    return found


def parts(kernel: Any) -> dict[str, Any]:
    """A kernel and every `triton.jit` function that it calls, in turn, by module and name."""
    found: dict[str, Any] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop().fn
        name = f"{function.__module__}.{function.__qualname__}"
        if name not in found:
            found[name] = function
            waiting += [value for _, value in _globals_of(function) if _is_ours(value)]
    return found


def _is_ours(value: Any) -> bool:
    """Whether it is a `triton.jit` function that is no part of Triton."""
    return inspect.isfunction(getattr(value, "fn", None)) and not value.fn.__module__.startswith("triton.")


def fingerprint(form: Form) -> str:
    """What a form compiles to depends on this alone, besides Triton's version: its code, types and constants.

    The code is that of the kernel and of the `triton.jit` functions that it calls, without comments and docstrings,
    with the global constants that they read.
    """
    content = [repr((form.signature, form.constants, form.num_warps, form.num_stages, sorted(form.aligned)))]
    for name, function in sorted(parts(form.kernel).items()):
        constants = sorted(
            f"{key} = {getattr(value, 'value', value)!r}"
            for key, value in _globals_of(function)
            if isinstance(getattr(value, "value", value), (bool, int, float, str)) and key != INTERPRETED
        )
        constants += [f"{INTERPRETED} = False" for key, _ in _globals_of(function) if key == INTERPRETED]
        content += [name, _code(function), *constants]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


@functools.cache
def _tree(function: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    tree.decorator_list = []
    return tree


@functools.cache
def _code(function: Any) -> str:
    return ast.dump(_tree(function))


@functools.cache
def _names(function: Any) -> tuple[tuple[str, str | None], ...]:
    """The names in a function's code, and `(module, attribute)` where there is a dot; the same one again and again."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.Name):
            found.append((node.id, None))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.append((node.value.id, node.attr))
    return tuple(found)


def _globals_of(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function's code names outside itself: globals, and attributes of modules among them."""
    for name, attribute in _names(function):
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        if attribute is None:
            yield name, value
        elif inspect.ismodule(value) and hasattr(value, attribute):
            yield f"{name}.{attribute}", getattr(value, attribute)
