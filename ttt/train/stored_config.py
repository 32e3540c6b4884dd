"""A run's `config.yaml`: the resolved config, with which the run goes on.

Its last line is a checksum, which tells a later change. What somebody wrote or commented by hand in its place is put
aside before it is replaced, as `config.original.yaml`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt.check.load import load_config
from ttt.checkpoint_folder import Checkpoint
from ttt.config.dumping import dump_config
from ttt.config.schema import RunConfig, with_its_target_eps
from ttt.dotted import dotted
from ttt.errors import ConfigError
from ttt.files import temporary_beside, write_bytes, write_text, writing
from ttt.plugins import Backbone
from ttt.reading import other_kind

CONFIG = "config.yaml"
ORIGINAL = "config.original.yaml"
"""A config by hand that was in the place of the resolved one."""

MAY_DIFFER = frozenset(
    {
        "run_dir",
        "eval.eval_freq",
        "eval.tasks",
        "train.max_steps",
        "train.device",
        "train.cpu_threads",
        "train.gradient_checkpointing",
        "train.log_freq",
        "train.evidence_freq",
        "train.ckpt_freq",
        "train.ckpt_keep",
        "ttt.scan_checkpoint_group_size",
        "data.verify",  # of plugins whose data carry checksums
    }
)
"""Keys that may change when a run is resumed: they decide how long, where and how often, not what is
computed; what tasks measure is no part of training."""

_MAX_CONFIG = 1 << 20
_COMMENT = re.compile(r"(^|\s)#", re.MULTILINE)
_CHECKSUM = "# sha256 of the lines above, which tells a later change: "


class StoredConfig:
    """The config in a run's folder. Making the object reads and writes nothing."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.path = run / CONFIG

    def write(self, config: RunConfig) -> None:
        """Write the resolved config. If the run goes on, call it only while the metrics file is held.

        Raises:
            EnvironmentProblem: it cannot be written.
        """
        text = dump_config(config.model_copy(update={"run_dir": str(self._run)}))
        write_text(self.path, f"{text}{_CHECKSUM}{_digest_of(text)}\n")

    def keep_original(self) -> None:
        """Put a config that somebody wrote by hand aside, so that `write` does not replace its comments.

        Raises:
            EnvironmentProblem: it cannot be written.
        """
        with writing(self._run):
            if self.path.is_file() and not _is_resolved(_text(self.path)):
                self._put_aside()

    def keep_comments(self) -> None:
        """Put the config of a run that goes on aside, if somebody wrote comments into it.

        Raises:
            EnvironmentProblem: it cannot be written.
        """
        with writing(self._run):
            if self.path.is_file():
                content, found, rest = _text(self.path).rpartition(_CHECKSUM)
                if _COMMENT.search(content if found else rest):
                    self._put_aside()

    def _put_aside(self) -> None:
        """Copy the config. It stays until the resolved one replaces it, so that a kill always leaves one."""
        content = self.path.read_bytes()
        for name in itertools.chain(
            [ORIGINAL], (ORIGINAL.replace(".yaml", f"-{number}.yaml") for number in itertools.count(2))
        ):
            place = self._run / name
            if not os.path.lexists(place):
                write_bytes(place, content)
                break
            if other_kind(place) is None and place.read_bytes() == content:
                break  # a run that was killed has put it there
        if self.path.is_symlink():  # what it leads to is not the run's to write to
            temporary = temporary_beside(self.path)
            write_bytes(temporary, content)
            os.replace(temporary, self.path)

    def is_as_written(self) -> bool | None:
        """Whether it has the checksum that it was written with; None if it has none, or is not there."""
        try:
            text = self.path.read_bytes().decode("utf-8", "replace")
        except OSError:
            return None
        return _is_as_written(text)

    def change_since(self, checkpoint: Checkpoint, config: RunConfig) -> str | None:
        """What somebody, or a damaged disk, has changed in it since the run wrote it, as a sentence.

        Args:
            checkpoint: its record says how the run was configured.
            config: what the stored config says now, overrides included.

        Returns:
            None if it is as it was written, says the same in other words, or cannot tell.
        """
        recorded = checkpoint.state.get("config")
        if self.is_as_written() is not False or not isinstance(recorded, dict):
            return None
        before, now = dotted(recorded), dotted(config.model_dump(mode="json"))
        differing = [key for key in before if key in now and before[key] != now[key] and key != "run_dir"]
        listed = "; ".join(f"{key}: {_in_words(before[key])} then, {_in_words(now[key])} now" for key in differing)
        return f"{self.path} was changed since the run wrote it ({listed})" if differing else None

    def require_same(self, checkpoint: Checkpoint, config: RunConfig, backbone: Backbone) -> None:
        """Refuse to go on with a config that computes something else than the run did.

        Raises:
            ConfigError: it asks for another run; the message names every key.
        """
        recorded = self._recorded(checkpoint, backbone)
        known = dotted(recorded)  # without keys that only a later ttt has
        differences = [found for found in _differences(recorded, config.model_dump(mode="json")) if found[0] in known]
        if differences:
            listed = "; ".join(
                f"{key}: {_in_words(before)} in the run, {_in_words(now)} now" for key, before, now in differences
            )
            changed = f"; its {CONFIG} was changed since the run wrote it" if self.is_as_written() is False else ""
            raise ConfigError(
                f"{self._run}: the run to resume was started with another config ({listed}); take these back, or "
                f"start a new run in another run_dir{changed}"
            )

    def _recorded(self, checkpoint: Checkpoint, backbone: Backbone) -> dict[str, Any]:
        """How the run was configured: what the checkpoint recorded; of an older run, what the stored config says.

        The checkpoint's record has a checksum, while the stored config may be the very one that is compared.
        """
        recorded = checkpoint.state.get("config")
        if isinstance(recorded, dict):
            ttt = recorded.get("ttt")
            return {**recorded, "ttt": with_its_target_eps(ttt)} if isinstance(ttt, dict) else recorded
        return load_config(self.path, backbone=backbone, resuming=True).config.model_dump(mode="json")


def config_differences(stored: RunConfig, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Keys, with both values, in which the configs differ and a resumed run may not."""
    return _differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))


def _differences(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    before, now = dotted(stored), dotted(config)
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in MAY_DIFFER
    ]


def _in_words(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def is_of_a_run(config: Path) -> bool:
    """Whether a run wrote a config, even if it was changed since."""
    text = _text(config)
    return _is_as_written(text) is not None or _is_resolved(text)


def is_a_config(config: Path) -> bool:
    """Whether a YAML file has the one section that every config has."""
    return bool(re.search(r"""^[{\s]*["']?backbone(["']|\b)[^\n]*""", _text(config), re.MULTILINE))


def _is_as_written(text: str) -> bool | None:
    """Whether a text has the checksum that it was written with; None if it has none."""
    content, found, digest = text.rpartition(_CHECKSUM)
    return digest.strip() == _digest_of(content) if found else None


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _text(config: Path) -> str:
    with open(config, "rb") as file:
        return file.read(_MAX_CONFIG).decode("utf-8", errors="replace")


def _is_resolved(text: str) -> bool:
    """Whether a run wrote it: its checksum holds; or, if it has none, it has every section in order and no comment."""
    as_written = _is_as_written(text)
    if as_written is not None:
        return as_written
    sections = re.findall(r"^(\w+):", text, re.MULTILINE)
    return sections == list(RunConfig.model_fields) and not re.search(r"(^|\s)#", text)
