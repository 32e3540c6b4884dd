"""The types of foreseeable errors. Each has the exit code with which the command line ends.

Messages are one sentence with the place and the fix; the command line prints them without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ttt.words import first_entries

if TYPE_CHECKING:
    from typing_extensions import Self

_NAMED_PROBLEMS = 5


class TTTError(Exception):
    """Anything foreseeable that ends the work; `exit_code` is the process's (1 if nothing says otherwise)."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str = "", *, details: Sequence[str] = (), key: str | None = None, fix: str = ""
    ) -> None:
        """Make the sentence `key: message; fix` of its parts.

        Args:
            message: what is wrong.
            details: lines to show below it.
            key: the config's key that is to blame, dotted, as `backbone.config_path`: `ttt check` places what a plugin
                raises at it.
            fix: the way out, as `write a path`. It may be a part of the message instead; then it is shown with it.
        """
        self._complaint = message if key is None else f"{key}: {message}"
        super().__init__("; ".join(filter(None, (self._complaint, fix))))
        self.details = tuple(details)
        """What is shown below the message, a line each; line breaks inside the message come from elsewhere."""
        self.key = key
        self.fix = fix

    @property
    def message(self) -> str:
        """The sentence."""
        return str(self.args[0]) if self.args else ""

    @property
    def told(self) -> str:
        """`str(error)` without the way out, which is `fix`."""
        return "\n  ".join((self._complaint, *self.details))

    def __str__(self) -> str:
        return "\n  ".join((self.message, *self.details))

    @classmethod
    def about(cls, problems: Sequence[str], what: str, *, where: str = "") -> Self:
        """One error about several problems: their number, and the first few. A single problem is the whole message."""
        place = f"{where}: " if where else ""
        if len(problems) == 1:
            return cls(f"{place}{problems[0]}")
        return cls(f"{place}{len(problems)} {what}:", details=first_entries(problems, _NAMED_PROBLEMS))


class UsageError(TTTError):
    """The call does not fit: a wrong argument, an unknown name, a run directory that is already in use."""

    exit_code = 2


class ConfigError(UsageError):
    """A config that cannot be honoured. `str(error)` holds every finding, each with its place."""

    def __init__(self, message: str, findings: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)
        """What was found, warnings and notes included, each a `ttt.config.Finding` (no type says so: this module knows
        nothing of configs); empty if the error is about more than one config."""


class InjectionError(UsageError):
    """TTT cannot be injected as planned; the model was left as it was."""


class AdapterMismatchError(UsageError):
    """An adapter file that belongs to something else; the message names each difference."""


class EnvironmentProblem(TTTError):  # noqa: N818 - EnvironmentError is Python's own, and means OSError
    """The machine lacks something: a file, weights, a package, disk space."""

    exit_code = 3


class UnreadableError(EnvironmentProblem):
    """A file exists but the system cannot read it. Its content may be undamaged."""


class ConfigEnvironmentError(ConfigError, EnvironmentProblem):
    """A config that is right, but names what this machine does not have."""

    exit_code = 3


class AdapterFileError(EnvironmentProblem):
    """An adapter file that is missing, cut short or not one of ours."""


class PluginError(EnvironmentProblem):
    """A plugin that is installed but cannot be used; the message names its distribution and the cause."""


class NonFiniteError(TTTError):
    """A loss or gradient that is not finite; training stopped before the optimiser step."""

    exit_code = 4


class InactiveLayerError(TTTError):
    """An injected TTT layer that was never reached, or whose fast weights did not move."""


class OtherProcessError(TTTError):
    """Another process of the run has failed and says why; this one ends with it, and with its exit code."""

    def __init__(self, message: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


class LostProcessError(TTTError):
    """Another process of the run is gone without a word, so that this one cannot go on."""

    exit_code = 3


class DamagedFileWarning(UserWarning):
    """Something damaged, or changed since it was written, was passed over; what was taken instead is named."""


class NestedCheckpointWarning(UserWarning):
    """What a choice of `scan_checkpoint_group_size` costs, alone or inside another checkpoint.

    It is about time and memory only: the layers of this library are pure, so no group size and no nesting
    can change a gradient.
    """
