"""`ttt check --data`: all data of a config, read as training would read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console

from ttt.check.data_codes import TTT521, TTT522
from ttt.config.findings import Finding
from ttt.config.schema import RunConfig
from ttt.errors import PluginError, TTTError
from ttt.plugins import Backbone, DataReading, has_capability
from ttt.progress import Steps


def read_all_data(config: RunConfig, backbone: Backbone, *, console: Console) -> list[Finding]:
    """Read the training and the held-out data wholly.

    A backbone with `ttt.plugins.DataReading` reads them itself; of others every window is made. Codecs and tokenizers
    may be loaded for it, but no model is built.

    Args:
        config: what `ttt.check.load_config` returned, without errors.
        backbone: its plugin.
        console: where to tell how far it is.

    Returns:
        TTT521 for each split that cannot be read, TTT522 for each kind of what is odd. They have no place.

    Raises:
        PluginError: the plugin failed.
    """
    return [
        finding
        for split, key in _splits(config, backbone)
        for finding in _read(config, backbone, split, f"data.{key}", console)
    ]


def _splits(config: RunConfig, backbone: Backbone) -> Iterator[tuple[str, str]]:
    yield "train", "train_data"
    if backbone.has_eval_data(config):
        yield "eval", "eval_data"


def _read(config: RunConfig, backbone: Backbone, split: str, path: str, console: Console) -> Iterator[Finding]:
    try:
        odd = _told(config, backbone, split, console)
    except PluginError:
        raise
    except TTTError as error:
        key = error.key if error.key is not None and error.key.split(".")[0] in ("data", "backbone") else path
        told = error.told.removeprefix(f"{key}: ").replace("\n  ", "; ").replace(":; ", ": ")
        yield TTT521.at(key, told, error.fix or "mend the data, or name others")
        return
    for sentence in odd:
        yield TTT522.at(path, sentence.removeprefix(f"{path}: "), "mend the data, or go on if they are meant so")


def _told(config: RunConfig, backbone: Backbone, split: str, console: Console) -> Sequence[str]:
    if has_capability(backbone, DataReading):
        return backbone.read_data(config, split=split, console=console)
    windows = backbone.dataset(config, split=split, device="cpu")
    with Steps(console, f"data.{split}", total=len(windows), tenths=True) as steps:
        for index in steps.counted(range(len(windows))):
            windows[index]
    return ()
