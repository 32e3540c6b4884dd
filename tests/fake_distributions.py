"""Plugins that are really installed, in a folder of the test's own: a module and the metadata that points to it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ttt import plugins

TOY = "from toy_config import ttt_backbone  # noqa: F401\n"
"""The module of a plugin that works."""


def install(
    folder: Path,
    name: str,
    module: str,
    source: str,
    *,
    distribution: str | None = None,
    groups: Sequence[str] = (plugins.GROUP,),
) -> None:
    """Install version 1.2 of a distribution whose entry point `name`, in each group, is a module of that source."""
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    distribution = distribution or f"ttt-{name}"
    metadata = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {module}\n" for group in groups))


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """What is installed in the folder is there for imports and for discovery; afterwards it never was."""
    modules = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    plugins.forget()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for module in set(sys.modules) - modules:
            if getattr(sys.modules[module], "__file__", None) and str(folder) in str(sys.modules[module].__file__):
                del sys.modules[module]
        importlib.invalidate_caches()
        plugins.forget()
