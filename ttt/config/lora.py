"""The `lora` section of a config, and what of it an adapter file keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ttt.config.paths import LocalPath
from ttt.config.section import Section
from ttt.config.values import MOST_FACTOR, MOST_RANK

Adapter = Literal["ttt", "lora", "ttt+lora"]
"""What is added to a backbone."""
Linears = Literal["all", "transformer", "attention", "feed_forward"]
"""Which of a backbone's linear layers LoRA goes into."""


class LoraConfig(Section):
    """The `lora` section: LoRA (arXiv 2106.09685) in the backbone's linear layers, alone or beside TTT.

    `W x` becomes `W x + scaling · B A x`, where A starts at random and B at zero.
    """

    rank: Annotated[int, Field(ge=1, le=MOST_RANK)] | Literal["match"] = 64
    """Rows of A. match takes the rank with which LoRA's parameters come nearest to those of the TTT layers that the
    `ttt` section describes, whether they are there or not."""
    scaling: Annotated[float, Field(gt=0, le=MOST_FACTOR)] = 2.0
    """Factor of B A x: as moshi-finetune has it, and PEFT's `lora_alpha / r`."""
    linears: Linears = "all"
    """Which linear layers: all of the model (as moshi-finetune has it), those of the main transformer, or of its
    attention or feed-forward alone."""
    init_from: Annotated[str | None, LocalPath()] = None
    """A LoRA to start from, in the backbone's own format, as moshi-finetune's `lora.safetensors`; null starts anew."""


@dataclass(frozen=True)
class LoraSettings:
    """What LoRA computes with: the `lora` section with its rank worked out."""

    rank: int
    scaling: float
    linears: Linears
