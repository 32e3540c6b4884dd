"""The error that a validator of a config section raises if values do not fit."""

from __future__ import annotations

from collections.abc import Sequence


class Misfit(ValueError):  # noqa: N818 - it becomes a finding and is not a failure of the program
    """Values that do not fit, raised in a pydantic validator of a section or of one of its fields.

    `ttt check` makes a finding of its three parts. Nothing depends on the wording of the message. If a section is built
    in Python, the error reads `message; fix`. A plain `ValueError` works too: its text is shown unchanged, and it
    blames the field whose validator raised it, or the whole section.

        raise Misfit("flavour: sour has no weights of its own", keys=("flavour", "weights"), fix="write weights: FILE")
    """

    def __init__(self, message: str = "", *, keys: Sequence[str] = (), fix: str = "") -> None:
        """Say what does not fit.

        Args:
            message: what is wrong, a sentence without a full stop; empty if the value alone says it.
            keys: the keys of the section that are to blame. The finding is placed at the first of them that the user
                wrote. If empty, blame the field whose validator raises this, or the whole section.
            fix: what to write instead, as `write weights: FILE`.
        """
        super().__init__("; ".join(filter(None, (message, fix))))
        self.message = message
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        self.fix = fix
