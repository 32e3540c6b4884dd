"""`ttt new-backbone`.

The distribution is made from the files in `templates/`: what ends in `.template` is filled in by `string.Template`,
other files are copied, and the folder `package` gets the package's name.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import unicodedata
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Annotated, NamedTuple

import typer

from ttt.printable import shell_word
from ttt_cli.options import is_standard_output, require_new_folder
from ttt_cli.terminal import show

TEMPLATES = Path(__file__).parent / "templates"
FILLED_IN = ".template"
"""What the name of a file ends in that has placeholders."""
LONGEST = 40
"""Characters of a name."""
_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_OF_THIS_PROJECT = ("moshi", "videodit", "transformers")
"""Backbones whose distributions are on the index, installed here or not."""
_IN_THE_TEMPLATES = ("backbone", "data")
"""Names whose classes the templates import from ttt: `BackboneOptions`, `DataOptions`."""


class Names(NamedTuple):
    """What a distribution and the things in it are called; the fields are the placeholders of the templates."""

    name: str
    """The backbone's."""
    distribution: str
    package: str
    Class: str
    """What its classes begin with."""

    @classmethod
    def of(cls, name: str) -> Names:
        """All names that follow from the backbone's: `my-model` is `MyModel` in the package `ttt_my_model`."""
        words = re.split("[-_]", name)
        return cls(name, "-".join(["ttt", *words]), "_".join(["ttt", *words]), "".join(map(str.capitalize, words)))


def new_backbone(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the backbone is to be called, as `my-model`.")],
    hf: Annotated[
        bool, typer.Option("--hf", help="For a causal language model of Hugging Face's transformers: a few lines.")
    ] = False,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="Where to; new or empty. [default: ttt-NAME]")
    ] = None,
) -> None:
    """Write the distribution of a new backbone, which passes the laws and trains at once.

    Its README lists what to change, and in which order, until it is your model.
    """
    from ttt.files import write_folder

    _require_name(name)
    names = Names.of(name)
    _require_free(names)
    folder = Path(names.distribution if out is None else out)
    _require_new(folder, given=out)
    write_folder(folder, contents(names, "hf" if hf else "backbone"))
    _show_next_steps(folder, name)


def contents(names: Names, kind: str) -> dict[str, bytes]:
    """The files of a new distribution: contents by path.

    Args:
        names: what takes the place of the placeholders.
        kind: the folder in `templates/`.
    """
    from ttt.version import __version__

    root = TEMPLATES / kind
    words = {**names._asdict(), "version": __version__}
    found = {}
    for file in sorted(file for file in root.rglob("*") if file.is_file()):
        first, *rest = file.relative_to(root).parts
        path = "/".join([names.package if first == "package" else first, *rest])
        content = file.read_bytes()
        if path.endswith(FILLED_IN):
            content = Template(content.decode()).substitute(words).encode()
        found[path.removesuffix(FILLED_IN)] = content
    return found


def _require_name(name: str) -> None:
    """Refuse a name that cannot be a backbone's, a distribution's and a part of a package's.

    Raises:
        UsageError: it cannot; the message has one that can, if there is one.
    """
    from ttt.errors import UsageError

    if not name:
        raise UsageError("NAME is empty; write what the backbone is to be called, as `my-model`")
    if not _NAME.fullmatch(name):
        close = _made_fit(name)
        raise UsageError(
            f"NAME: {name!r:.80} cannot be a backbone's name: it begins with a letter a to z, has such letters and "
            f"digits, and may have single dashes or underscores inside" + (f"; write `{close}`" if close else "")
        )
    if len(name) > LONGEST:
        raise UsageError(f"NAME: {name:.80} has {len(name)} characters; {LONGEST} are the most, so write a shorter one")
    without = re.sub("^(ttt[-_])+", "", name)
    if without != name:
        raise UsageError(f"NAME: the package of every backbone begins with ttt_, so write `{without}` for {name}")
    reason = _reserved(name)
    if reason:
        raise UsageError(f"NAME: {name} {reason}; write another, as `my-{name}`")


def _made_fit(name: str) -> str | None:
    """A name that is as close to this one as can be; None if nothing of it can be kept."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    words = re.sub("[^a-z0-9]+", "-", letters).strip("-")
    return words if _NAME.fullmatch(words) and len(words) <= LONGEST else None


def _reserved(name: str) -> str | None:
    """Why a well-formed name means something else; None if it does not."""
    import yaml

    if keyword.iskeyword(name):
        return "is a word of Python's"
    read = yaml.safe_load(name)
    if not isinstance(read, str):
        return f"is no text in a config: YAML reads {read!r}"
    if name in _IN_THE_TEMPLATES:
        return f"would give its options the name of ttt's own {name.capitalize()}Options"
    return None


def _require_free(names: Names) -> None:
    """Refuse a name that is taken.

    Raises:
        UsageError: an installed backbone, distribution or module has it, or a backbone of this project.
    """
    from ttt.errors import UsageError

    taken = _taken(names)
    if taken:
        raise UsageError(f"NAME: {names.name} is taken: {taken}; write another name")


def _taken(names: Names) -> str | None:
    """What has one of the names already."""
    from ttt import plugins

    same = next((name for name in plugins.names() if Names.of(name).package == names.package), None)
    if same is not None:
        return f"the backbone {same} is installed"
    if names.name in _OF_THIS_PROJECT:
        return f"{names.distribution} is a distribution of this project"
    if any(metadata.distributions(name=names.distribution)):
        return f"the distribution {names.distribution} is installed"
    if importlib.util.find_spec(names.package) is not None:
        return f"the package {names.package} is installed"
    return None


def _require_new(folder: Path, *, given: str | None) -> None:
    """Refuse a place that holds anything, or where no folder can be made.

    Raises:
        UsageError: something is there, or it is no place for a folder.
        EnvironmentProblem: the folder above it cannot be written.
    """
    from ttt.errors import UsageError
    from ttt.files import require_place

    if given is not None and (not given.strip() or is_standard_output(given)):
        raise UsageError("--out: name a folder that is new or empty")
    require_new_folder(folder)
    if folder.is_dir() and folder.samefile(Path()):
        raise UsageError(f"{folder}: is the folder that you are in; go to the one above it, or name another with --out")
    require_place(folder)


def _show_next_steps(folder: Path, name: str) -> None:
    show(f"Wrote {folder}. It passes the laws and trains as it is:")
    show(f"  cd {shell_word(folder)}")
    show("  pip install -e '.[test]'")
    show("  pytest tests")
    show(f"  ttt train --backbone {name}")
    show("Then put your model in: README.md says what to change, in which order; `grep -rn CHANGE .` finds the places.")
