"""`ttt precompute`."""

from __future__ import annotations

from typing import Annotated

import typer

from ttt_cli.options import Overrides
from ttt_cli.terminal import show_note


def precompute(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A config file; its data section says what to make.")],
    overrides: Overrides = None,
) -> None:
    """Make a backbone's training data, as latents from videos.

    It continues after an interruption: finished files stay, and are not made again.
    """
    from rich.console import Console

    from ttt.check import load_config
    from ttt.plugins import Precomputing, capability
    from ttt.train.terminal import lasting

    loaded = load_config(config, overrides=overrides or [], training=False)
    maker = capability(loaded.backbone, Precomputing)
    console = Console()
    try:
        with lasting(console):
            maker.precompute(loaded.config, console=console)
    except KeyboardInterrupt:
        show_note("interrupted; what is done stays: the same command goes on")
        raise
