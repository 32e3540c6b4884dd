"""A run's `config.yaml`: the resolved config, with which the run goes on.

Its last line is a checksum, which shows a later change. A `config.yaml` that was written or commented by hand is copied
to `config.original.yaml` before it is replaced.
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
from ttt.config.paths import folder_note, moved_path, noted_folder, with_absolute_paths, without_note
from ttt.config.schema import RunConfig, with_its_target_eps
from ttt.dotted import dotted
from ttt.errors import ConfigError
from ttt.files import temporary_beside, write_bytes, write_text, writing
from ttt.plugins import Backbone
from ttt.plugins.run_config import default_values
from ttt.reading import other_kind

CONFIG = "config.yaml"
ORIGINAL = "config.original.yaml"
"""The copy of a config.yaml that was written or commented by hand, before the resolved config replaced it."""

MAY_DIFFER = frozenset(
    {
        "run_dir",
        "eval.eval_freq",
        "eval.tasks",
        "eval.eval_batch_size",
        "eval.reset_sec",
        "eval.reset_tokens",
        "train.max_steps",
        "train.parallel.replicate",
        "train.parallel.shard",
        "train.parallel.tensor",
        "train.device",
        "train.cpu_threads",
        "train.cuda_graphs",
        "train.gradient_checkpointing",
        "train.log_freq",
        "train.evidence_freq",
        "train.loggers",
        "train.ckpt_freq",
        "train.ckpt_keep",
        "train.ckpt_async",
        "ttt.scan_checkpoint_group_size",
        "data.codes",  # of Moshi: the same windows, encoded before
        "data.num_workers",
        "data.verify",  # of plugins whose data carry checksums
    }
)
"""Keys that may change when a run is resumed: they say how long, where and how often, but not what is computed; the
tasks' measurements are not part of training."""

_MAX_CONFIG = 1 << 20
_LATER = ("adapter", "lora")
"""Sections that a config without a checksum may lack: its run was of a version that had none of them."""
_COMMENT = re.compile(r"(^|\s)#", re.MULTILINE)
_CHECKSUM = "# sha256 of the lines above, which tells a later change: "


class StoredConfig:
    """The config in a run's folder. Making the object reads and writes nothing."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.path = run / CONFIG

    def write(self, config: RunConfig) -> None:
        """Write the resolved config. If the run goes on, call it only while the metrics file is locked.

        Raises:
            EnvironmentProblem: it cannot be written.
        """
        text = dump_config(self._to_store(config)) + folder_note(self._run)
        write_text(self.path, f"{text}{_CHECKSUM}{_digest_of(text)}\n")

    def record(self, config: RunConfig) -> dict[str, Any]:
        """The config as a checkpoint keeps it."""
        return self._to_store(config).model_dump(mode="json")

    def _to_store(self, config: RunConfig) -> RunConfig:
        """The config with absolute paths, so that it means the same in every folder."""
        return with_absolute_paths(config).model_copy(update={"run_dir": str(self._run)})

    def keep_original(self) -> None:
        """Copy a config that was written by hand to `config.original.yaml`, before `write` replaces it.

        Raises:
            EnvironmentProblem: it cannot be written.
        """
        with writing(self._run):
            if self.path.is_file() and not _is_resolved(_text(self.path)):
                self._put_aside()

    def keep_comments(self) -> None:
        """Copy the config of a run that goes on to `config.original.yaml`, if somebody added comments to it.

        Raises:
            EnvironmentProblem: it cannot be written.
        """
        with writing(self._run):
            if self.path.is_file():
                content, found, rest = _text(self.path).rpartition(_CHECKSUM)
                if _COMMENT.search(without_note(content) if found else rest):
                    self._put_aside()

    def _put_aside(self) -> None:
        """Copy the config. The original stays until the resolved one replaces it, so that a kill always leaves one."""
        content = self.path.read_bytes()
        for name in itertools.chain(
            [ORIGINAL], (ORIGINAL.replace(".yaml", f"-{number}.yaml") for number in itertools.count(2))
        ):
            place = self._run / name
            if not os.path.lexists(place):
                write_bytes(place, content)
                break
            if other_kind(place) is None and place.read_bytes() == content:
                break  # a run that was killed has already copied it
        if self.path.is_symlink():  # the run must not write to the link's target
            temporary = temporary_beside(self.path)
            write_bytes(temporary, content)
            os.replace(temporary, self.path)

    def is_as_written(self) -> bool | None:
        """Whether its checksum matches; None if it has none, or there is no file. A run writes UTF-8."""
        try:
            return _is_as_written(self.path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            return False
        except OSError:
            return None

    def change_since(self, checkpoint: Checkpoint, config: RunConfig) -> str | None:
        """Say what has changed in the stored config since the run wrote it, by hand or by a damaged disk.

        Args:
            checkpoint: the checkpoint with the record of the run's config.
            config: the stored config as it is now, with overrides.

        Returns:
            One sentence; None if the file is as written, has the same values, or has no checksum.
        """
        recorded = checkpoint.state.get("config")
        if self.is_as_written() is not False or not isinstance(recorded, dict):
            return None
        before, now = dotted(recorded), dotted(self.record(config))
        differing = [
            key
            for key in before
            if key in now and before[key] != now[key] and key != "run_dir" and not self._moved(before[key], now[key])
        ]
        listed = "; ".join(f"{key}: {_in_words(before[key])} then, {_in_words(now[key])} now" for key in differing)
        return f"{self.path} was changed since the run wrote it ({listed})" if differing else None

    def require_same(self, checkpoint: Checkpoint, config: RunConfig, backbone: Backbone) -> None:
        """Refuse to go on with a config that would compute something else than the run did.

        Raises:
            ConfigError: the configs differ; the message names every key.
        """
        recorded = self._recorded(checkpoint, backbone)
        known = dotted(recorded)
        later = default_values(type(config))  # a ttt of before a key did what its default does
        differences = [
            (key, before if key in known else later[key], now)
            for key, before, now in _differences(recorded, self.record(config))
            if not self._moved(before, now) and (key in known or _is_new(key, now, later))
        ]
        if differences:
            listed = "; ".join(
                f"{key}: {_in_words(before)} in the run, {_in_words(now)} now" for key, before, now in differences
            )
            changed = f"; its {CONFIG} was changed since the run wrote it" if self.is_as_written() is False else ""
            raise ConfigError(
                f"{self._run}: the run to resume was started with another config ({listed}); take these back, or "
                f"start a new run in another run_dir{changed}"
            )

    def _moved(self, before: Any, now: Any) -> bool:
        """Whether two values mean one place: by an older run a path was kept as written, and places move with a run."""
        if not isinstance(before, str) or not isinstance(now, str) or not os.path.isabs(now):
            return False
        if not os.path.isabs(before):
            return os.path.abspath(before) == now
        folder = noted_folder(_text(self.path)) if self.path.is_file() else None
        return folder is not None and moved_path(before, before=folder, now=str(self._run)) == now

    def _recorded(self, checkpoint: Checkpoint, backbone: Backbone) -> dict[str, Any]:
        """The run's config as the checkpoint recorded it; for an older run without a record, the stored config.

        The checkpoint's record has a checksum; the stored config may be the one that it is compared with.
        """
        recorded = checkpoint.state.get("config")
        if isinstance(recorded, dict):
            ttt = recorded.get("ttt")
            return {**recorded, "ttt": with_its_target_eps(ttt)} if isinstance(ttt, dict) else recorded
        return load_config(self.path, backbone=backbone, resuming=True).config.model_dump(mode="json")


def config_differences(stored: RunConfig, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Keys, with both values, that differ between the configs and may not differ in a resumed run."""
    return _differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))


def _differences(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    before, now = dotted(stored), dotted(config)
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in MAY_DIFFER and not key.startswith("eval.score.")
    ]


def _is_new(key: str, now: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether a key that an older record lacks has another value than its default.

    A backbone has defaults of its own for the section `ttt`, so nothing is known of that.
    """
    return key in defaults and not key.startswith("ttt.") and defaults[key] != now


def _in_words(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def is_of_a_run(config: Path) -> bool:
    """Whether a run wrote the config, even if it was changed later."""
    text = _text(config)
    return _is_as_written(text) is not None or _is_resolved(text)


def is_a_config(config: Path) -> bool:
    """Whether a YAML file has the one section that every config has."""
    return bool(re.search(r"""^[{\s]*["']?backbone(["']|\b)[^\n]*""", _text(config), re.MULTILINE))


def _is_as_written(text: str) -> bool | None:
    """Whether the checksum of a text matches; None if it has none."""
    content, found, digest = text.rpartition(_CHECKSUM)
    return digest.strip() == _digest_of(content) if found else None


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _text(config: Path) -> str:
    with open(config, "rb") as file:
        return file.read(_MAX_CONFIG).decode("utf-8", errors="replace")


def _is_resolved(text: str) -> bool:
    """Whether a run wrote the text: its checksum matches or, without one, it has all sections in order, no comments."""
    as_written = _is_as_written(text)
    if as_written is not None:
        return as_written
    sections = re.findall(r"^(\w+):", text, re.MULTILINE)
    known = [name for name in RunConfig.model_fields if name in sections or name not in _LATER]
    return sections == known and not re.search(r"(^|\s)#", text)
