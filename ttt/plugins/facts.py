"""What a backbone states about its model and data before they are built or read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field

from ttt.config.sources import DataSource


@dataclass(frozen=True)
class NeededFile:
    """A file that a backbone reads to build its model or to make its data, so that `ttt check` can look at it."""

    path: str
    """As the user wrote it; relative ones start at the folder that the command runs in."""
    what: str
    """The file in the field's words, "weights of the language model"; completes "write the path of the …"."""
    kinds: tuple[str, ...] = ()
    """The kinds of file that it may be, as `ttt.files.FileKind.name` has them: `("safetensors file",)`. Something
    else that its first bytes tell is refused; empty allows all but pointers, pages, archives and empty files."""


@dataclass(frozen=True)
class RecordingFormat:
    """The format of a backbone's `.jsonl` data, so that `ttt check` can read it without a decoder.

    Every line is a JSON object whose key `path` names a file, relative to the folder of the `.jsonl`.
    """

    example: str
    """A correct line, for messages."""
    window_sec: float
    """Length of a window, seconds; each line's `duration` gives that of its file."""
    beside: str | None = None
    """Suffix of a file that must be beside each named file, as `.json`."""
    bare: frozenset[DataSource] = frozenset()
    """Sources whose files need nothing beside them; they may also be folders of such files, without a `.jsonl`."""
    suffixes: tuple[str, ...] = ()
    """Endings of the files in such folders."""

    @property
    def lacking(self) -> str:
        """What is said of a line that does not have what it should."""
        return "without a path or a duration"


@dataclass(frozen=True)
class LineFormat:
    """The format of a backbone's `.jsonl` data if the lines hold the data themselves, so that `ttt check` can read it.

    Every line is a JSON object with these keys. Files with other endings are left to the backbone.
    """

    example: str
    """A correct line, for messages."""
    keys: Mapping[str, type]
    """The keys that a line must have, each with the type of its value."""
    longest: int = 1 << 20
    """Bytes of the longest line that the backbone reads."""

    @property
    def lacking(self) -> str:
        """What is said of a line that does not have what it should."""
        return "without " + " and ".join(
            f"a {_WORDS.get(kind, kind.__name__)} `{key}`" for key, kind in self.keys.items()
        )


_WORDS: Mapping[type, str] = {str: "text", int: "whole number", float: "number", bool: "true or false", list: "list"}


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
    """Tokens of one training window; None if the options do not fix it."""
    window: str = "a window"
    """The window in the user's words, "15 s of audio"."""
    parameters: int | None = None
    """Parameters of the model, without TTT; with the next three, `ttt check` says whether a run fits in memory."""
    attention_parameters: int | None = None
    """The number of parameters that `Backbone.is_attention` names."""
    layer_activation_bytes: int | None = None
    """Bytes that autograd keeps per token and layer, in the config's `param_dtype`, if the whole layer is trained."""
    head_activation_bytes: int | None = None
    """Bytes that it keeps per token outside the layers, with the config's `gradient_checkpointing`: heads, losses."""
    lines: LineFormat | None = None
    """The format of `data.train_data` and `data.eval_data` if their `.jsonl` files hold the data themselves."""
    recordings: RecordingFormat | None = None
    """The format of `data.train_data` and `data.eval_data`, if they are `.jsonl` files or folders of them."""
    checkpoints_around_scans: tuple[int, ...] | None = None
    """One entry for each time that a layer's scan runs in a forward pass: how many of the backbone's activation
    checkpoints around it recompute it, with this config. A layer that reads a sequence in both directions has two
    entries. None means one scan, with one checkpoint around it if `train.gradient_checkpointing`, else with none."""
    gates: int = 1
    """Gates α of D channels in one adapter."""
    layers_per_checkpoint: int = 1
    """The number of layers inside one checkpoint of `train.gradient_checkpointing`."""
    layer_parameters: int | None = None
    """Parameters of one of its layers; if parameters are split over devices, a device has one layer's at a time, and
    those that are in no layer."""
    less_memory: Mapping[str, object] = field(default_factory=dict)
    """Options of the backbone that make training keep less and learn the same, with the values that do; without those
    that the config has. `ttt check --devices` tries them where nothing fits."""
    scans: InitVar[None] = None
    """The name that `checkpoints_around_scans` once had; giving it is a `TypeError` that says so."""

    def __post_init__(self, scans: None) -> None:
        if scans is not None:
            raise TypeError("BackboneFacts.scans is now called checkpoints_around_scans; rename it")
