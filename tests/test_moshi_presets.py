"""Moshi's commented configs: what their comments claim is what `ttt check` says, and what they offer is accepted."""

from __future__ import annotations

import re

import pytest

from ttt.check import check_config
from ttt.plugins import get_backbone

TEXT = get_backbone("moshi").presets()["7b"]
OFFERED = re.findall(r"^( *)# ((?:\w+): \S.*)$", TEXT, re.MULTILINE)
"""Keys in comments, with their indentation."""


def codes(text: str) -> set[str]:
    """What `ttt check` finds in a config, but for the data that it does not have."""
    return {finding.code for finding in check_config("7b.yaml", text=text).findings} - {"TTT501"}


def test_its_numbers_are_those_of_ttt_check() -> None:
    """Memory, sizes on the disk, parameters."""
    checked = check_config("7b.yaml", text=TEXT, cost=True)
    (cost,) = [finding.message for finding in checked.findings if finding.code == "TTT405"]
    memory = re.search(r"needs ([\d.]+ GiB to [\d.]+ GiB) of device memory", cost)
    disk = re.search(r"an adapter takes ([\d.]+ \wiB) on disk, and a checkpoint ([\d.]+ \wiB)", cost)
    assert memory is not None
    assert disk is not None
    assert f"It needs {memory[1]} of device memory" in TEXT
    assert float(memory[1].split()[-2]) < 24e9 / 2**30  # "a GPU of 24 GB"
    assert f"{disk[1]} an adapter, {disk[2]} a checkpoint" in TEXT
    parameters = 3 * (2 * 32 * (128 * 512 * 2 + 512 + 128) // 2 + 4 * (4096 * 4096 + 4096) + 32 * 4096 + 32)
    assert parameters < 214_474_848 < 1.01 * parameters  # by hand, but for the norms and gates


def test_it_says_what_else_a_run_takes() -> None:
    for word in (
        "HF_HOME",
        "annotate.py",
        "whisper-timestamped",
        "ttt eval RUN",
        "ttt sample RUN",
        "--cost",
        "eval_freq",
    ):
        assert word in TEXT, word
    assert codes(TEXT) == set()


@pytest.mark.parametrize("offered", ["ttt_layer_context", "format", "adapter", "lora"])
def test_what_it_offers_in_comments_is_accepted(offered: str) -> None:
    """Uncommented, a key is one that the schema knows, with a value that it takes."""
    (line,) = [line for line in TEXT.splitlines() if line.strip().startswith(f"# {offered}: ")]
    wanted = {"adapter": ("adapter", "lora"), "lora": ("adapter", "lora")}.get(offered, (offered,))
    text = TEXT
    for name in wanted:
        text = re.sub(rf"^( *)# ({name}: )", r"\1\2", text, flags=re.MULTILINE)
    assert text != TEXT, line
    assert codes(text) <= {"TTT405"}
    assert codes(text.replace(f"{offered}: ", f"{offered}x: ", 1)) & {"TTT101"}
