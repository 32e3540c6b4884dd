"""What a backbone says of its model and its data before either is there."""

from __future__ import annotations

from dataclasses import InitVar, dataclass


@dataclass(frozen=True)
class RecordingFormat:
    """What the lines of a backbone's `.jsonl` data say, so that `ttt check` can read them without any decoder.

    Every line is a JSON object whose key `path` names a file, relative to the folder of the `.jsonl`.
    """

    example: str
    """A good line."""
    window_sec: float
    """Length of a window, seconds; each line's `duration` gives that of its file."""
    beside: str | None = None
    """Suffix of a file that must lie beside each one named, `.json`."""


@dataclass(frozen=True)
class BackboneFacts:
    """What a config check must know without building the model."""

    dim: int
    """Model width D at the sites."""
    num_heads: int
    """Attention heads; a TTT layer has as many unless `ttt.num_heads` says otherwise."""
    num_layers: int
    """Layers that TTT can go into."""
    tokens_per_window: int | None = None
    """Tokens of one training window, where the options fix it."""
    window: str = "a window"
    """The window in the user's words, "15 s of audio"."""
    parameters: int | None = None
    """Parameters of the model, without TTT; with the next three, `ttt check` says whether a run fits in memory."""
    attention_parameters: int | None = None
    """Those of them that `Backbone.is_attention` names."""
    layer_activation_bytes: int | None = None
    """What autograd keeps of one token in one layer, in the config's `param_dtype`, when all of it is trained."""
    head_activation_bytes: int | None = None
    """What it keeps of one token outside the layers, with the config's `gradient_checkpointing`: heads, losses."""
    recordings: RecordingFormat | None = None
    """How `data.train_data` and `data.eval_data` are written, where they are `.jsonl` files or folders of them."""
    checkpoints_around_scans: tuple[int, ...] | None = None
    """One entry for each time that a layer's scan runs in a forward pass: how many of the backbone's activation
    checkpoints around it recompute it, with this config. A layer that reads a sequence in both directions has two
    entries. None means one scan, with one checkpoint around it if `train.gradient_checkpointing`, else with none."""
    gates: int = 1
    """Gates α of D channels in one adapter."""
    layers_per_checkpoint: int = 1
    """Layers that one checkpoint of `train.gradient_checkpointing` is around."""
    scans: InitVar[None] = None
    """The name that `checkpoints_around_scans` once had; giving it is a `TypeError` that says so."""

    def __post_init__(self, scans: None) -> None:
        if scans is not None:
            raise TypeError("BackboneFacts.scans is now called checkpoints_around_scans; rename it")
