"""`ttt precompute`."""

from __future__ import annotations

from typing import Annotated

import typer

from ttt_cli.options import Overrides


def precompute(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A config file; its data section says what to make.")],
    overrides: Overrides = None,
) -> None:
    """Make a backbone's training data, as latents from videos.

    It goes on where it was stopped: what is done stays, and is not done again.
    """
    from rich.console import Console

    from ttt.config import load_config

    loaded = load_config(config, overrides=overrides or [], training=False)
    loaded.backbone.precompute(loaded.config, console=Console())
