"""What a plugin's package ships beside its code: presets, and files that are looked at before they are used."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path


def packaged_presets(package: str, names: Sequence[str], *, folder: str = "presets") -> dict[str, str]:
    """The presets that a package ships as YAML files, by name: what `Backbone.presets` returns.

    Args:
        package: its name.
        names: of the presets; `demo` is the file `demo.yaml`.
        folder: where in the package they are.
    """
    place = resources.files(package) / folder
    return {name: (place / f"{name}.yaml").read_text(encoding="utf-8") for name in names}


@dataclass(frozen=True)
class PackagedFiles:
    """Files that a package ships and that carry no checksum themselves, such as the data of its demo."""

    folder: Path
    digests: Mapping[str, str]
    """SHA-256 by the file's name, in hexadecimal; `sha256sum` gives that of a file made anew."""
    distribution: str
    """What is to be installed again if one is damaged."""

    def require_whole(self) -> None:
        """See that the files are those that were shipped, once in a process.

        Raises:
            EnvironmentProblem: one is not; the message names it.
        """
        _require_whole(self.folder, tuple(self.digests.items()), self.distribution)


@functools.cache
def _require_whole(folder: Path, digests: tuple[tuple[str, str], ...], distribution: str) -> None:
    from ttt.files import require_digests

    require_digests(folder, dict(digests), way_out=f"reinstall {distribution}")
