"""What a backbone plugin provides: everything `ttt` knows about a model that TTT goes into.

A plugin is a distribution with an entry point in the group `ttt.backbones`; the entry point names a module that
implements the hook `ttt_backbone` (see `ttt.hookspecs`) and returns an instance of a `Backbone` subclass.

The module must import without torch and without the backbone's own package: `ttt check` and `ttt plugins`
import it to read options. Import them inside the methods that need them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, Protocol

from ttt.asking import guard
from ttt.config.schema import BackboneOptions, DataOptions, DataT, OptionsT, RunConfig

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

    from ttt.config.importing import ImportedConfig
    from ttt.inject import Site

Batch = Any
"""A batch as the plugin's dataset collates it: any nesting of tuples, lists, dicts and tensors `[B, …]`."""


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
    scans: tuple[int, ...] | None = None
    """One entry for each time that a layer's scan runs in a forward pass: how many of the backbone's activation
    checkpoints around it recompute it, with this config. A layer that reads a sequence in both directions has two. None
    is one scan, inside one checkpoint with `train.gradient_checkpointing` and none without."""
    gates: int = 1
    """Gates α of D channels in one adapter."""
    layers_per_checkpoint: int = 1
    """Layers that one checkpoint of `train.gradient_checkpointing` is around."""


@dataclass(frozen=True)
class LossOutput:
    """What a batch became."""

    loss: Tensor
    """Scalar, differentiable: the mean over the batch."""
    tokens: int
    """Positions that the backbone read (B · T), for throughput."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars worth a line in `metrics.jsonl`, as `text_loss`."""


@dataclass(frozen=True)
class SampleRequest:
    """What `Backbone.sample` is asked for."""

    prompts: tuple[str, ...]
    """One for each segment, as many as `Backbone.plan_sample` said."""
    negative_prompts: tuple[str, ...]
    """What each segment is guided away from, an empty text if from nothing; no entries if none was given at all."""
    seconds: float
    """Length of the sample."""
    out: Path
    """Where the sample goes; its folder may have to be made."""
    steps: int
    """Steps of the sampler."""
    guidance_scale: float
    """Strength of classifier-free guidance; 1 is none."""
    seed: int
    """The same seed gives the same sample."""
    new_scenes: tuple[bool, ...] = ()
    """Whether each segment begins a scene of its own, the first never; no entries if none does."""
    imported_from: str | None = None
    """The program whose weights are sampled, as `Backbone.import_weights` wrote it into the adapter's header under
    `imported_from`; None if it was learned here, or there is no adapter. `ttt.sample` fills it in."""


@dataclass(frozen=True)
class SamplePlan:
    """What a sample of some length takes and leaves, known before a model is built."""

    prompts: int
    """How many prompts: one for each segment."""
    files: tuple[Path, ...]
    """What will be written, all of it in the folder of `out`; the command refuses to replace any of it unasked."""
    scenes: bool = False
    """Whether `SampleRequest.new_scenes` is heeded; if not, the command says so."""


class WindowDataset(Protocol):
    """Windows of training data, addressed by number, the windows of a file in order of time."""

    def __len__(self) -> int:
        """Number of windows."""
        ...

    def __getitem__(self, index: int) -> Any:
        """One window, as CPU tensors; the same index always gives the same window."""
        ...

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Windows to a batch."""
        ...

    @property
    def files(self) -> Sequence[range]:
        """The windows of each file: consecutive ranges that cover 0 … len-1."""
        ...

    def describe(self, index: int) -> str:
        """A window in the user's words, "dialogue.flac, 15.0-30.0 s"."""
        ...

    @property
    def notice(self) -> str | None:
        """What a user must know about this data, said when a run starts: that a stand-in made it, say."""
        ...


class Backbone(ABC, Generic[OptionsT, DataT]):
    """A backbone plugin. The class attributes and the first methods must work without torch.

    `class MyBackbone(Backbone[MyOptions, MyData])` tells a type checker what `config.backbone` and `config.data` are in
    its methods; `class MyBackbone(Backbone)` works as well.

    What a method raises that is no `ttt.errors.TTTError`, and an answer that is not what the method promises, reach
    the caller as a `ttt.errors.PluginError` that names the plugin, the method and the line; see `ttt.asking`.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        guard(cls, Backbone)

    name: ClassVar[str]
    """As in `--backbone NAME` and `backbone: {name: NAME}`."""
    causal: ClassVar[bool]
    """Whether a token may only see those before it; then TTT must be causal too."""
    streaming: ClassVar[bool] = False
    """Whether the model can be fed token by token; then `stream` is implemented."""
    options: ClassVar[type[BackboneOptions]]
    """The `backbone` section."""
    non_identity_options: ClassVar[frozenset[str]] = frozenset()
    """Names of options that do not say which model it is: where its weights lie, what is recomputed, how it is trained
    or sampled. `ttt.adapter_file.backbone_identity`, and so adapter files, leave them out."""
    data_options: ClassVar[type[DataOptions]] = DataOptions
    """The `data` section."""
    ttt_defaults: ClassVar[Mapping[str, Any]] = {}
    """The `ttt` section where the user names no preset: `preset` and what differs from it for this backbone."""
    sample_suffix: ClassVar[str] = ""
    """What the names of its samples end in, `.mp4`; without it `ttt sample` makes one sample at a time."""
    rules: ClassVar[Sequence[Callable[[RunConfig], Sequence[Any]]]] = ()
    """Extra rules for `ttt check`: functions of the resolved config that return `ttt.config.Finding`s."""

    # --- without torch ---

    def explanations(self) -> Mapping[str, Any]:
        """What the codes of `rules` mean, a `ttt.config.explanations.Explanation` for each: `ttt check --explain`."""
        return {}

    @abstractmethod
    def presets(self) -> Mapping[str, str]:
        """Complete, commented configs as YAML text, by preset name; `demo` must run anywhere, unchanged."""

    @abstractmethod
    def facts(self, config: RunConfig[OptionsT, DataT]) -> BackboneFacts:
        """Widths and lengths of the model and windows that `config` asks for."""

    def has_eval_data(self, config: RunConfig[OptionsT, DataT]) -> bool:
        """Whether the split `eval` holds data that training does not see; else the training data is evaluated."""
        data = config.data
        return data.eval_data is not None or (data.train_data is None and self.has_own_eval_data(config.backbone))

    def has_own_eval_data(self, options: OptionsT) -> bool:
        """Whether the data that the plugin brings, read if the config names none, has a part for evaluation."""
        return False

    def import_config(self, text: str, *, file: str) -> ImportedConfig | None:
        """A config of another program that this backbone's users have, in this project's terms.

        Args:
            text: the other program's config.
            file: its name, whose ending may say what it is.

        Returns:
            None if this backbone does not know it.

        Raises:
            ttt.errors.UsageError: it is one, but damaged; the message says where.
        """
        return None

    def plan_sample(self, config: RunConfig[OptionsT, DataT], *, seconds: float, out: Path) -> SamplePlan:
        """What a sample of so many seconds takes and leaves, where the backbone has `sample`.

        Raises:
            ttt.errors.UsageError: the backbone cannot sample, not that long, or not into such a file.
        """
        self._has_no("sampling: it cannot make anything from prompts")

    def check_sample(self, config: RunConfig[OptionsT, DataT], request: SampleRequest) -> None:
        """Refuse what `sample` could not honour, before anything large is built; all that can be told without it.

        Args:
            config: resolved.
            request: what is asked for.

        Raises:
            ttt.errors.UsageError: a number is out of its range, or prompts are missing; the message names which.
            ttt.errors.EnvironmentProblem: a file that sampling reads is missing.
        """
        wanted = self.plan_sample(config, seconds=request.seconds, out=request.out).prompts
        if len(request.prompts) != wanted:
            from ttt.errors import UsageError

            raise UsageError(f"{request.seconds:g} s take {wanted} prompts, but {len(request.prompts)} were given")

    # --- with torch ---

    @abstractmethod
    def build(self, options: OptionsT, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """The model, weights loaded, in eval mode; on the device `meta`, its structure alone.

        Raises:
            ttt.errors.EnvironmentProblem: weights or packages are missing.
        """

    def provenance(self, options: OptionsT) -> Mapping[str, str]:
        """Where the weights that `build` loaded came from, as `repository` and `commit`: adapter files record it.

        Nothing is downloaded; empty if there is nothing to say.
        """
        return {}

    @abstractmethod
    def sites(self, model: nn.Module) -> Sequence[Site]:
        """Where TTT can go, one for each layer, in order. The model is not changed."""

    @abstractmethod
    def dataset(self, config: RunConfig[OptionsT, DataT], *, split: str, device: torch.device | str) -> WindowDataset:
        """The windows of a split, `train` or `eval`.

        Raises:
            ttt.errors.EnvironmentProblem: files are missing or broken; the message names file and line.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, config: RunConfig[OptionsT, DataT]) -> LossOutput:
        """The training loss of a batch on the model's device.

        What it draws comes from torch's global generators, which are seeded for each pass: so a resumed run draws what
        the uninterrupted one would have drawn. What it draws for each row and would spread over all rows of a step, in
        however many passes the step reads them, it draws by what `ttt.rows.rows_of_step` says.
        """

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        """Switch the backbone's own activation checkpointing.

        Raises:
            ttt.errors.UsageError: the backbone has none and `enabled` asks for it.
        """
        if enabled:
            from ttt.errors import UsageError

            raise UsageError(
                f"train.gradient_checkpointing: the backbone {self.name} has no activation checkpointing; write false"
            )

    def is_attention(self, parameter_name: str) -> bool:
        """Whether a backbone parameter belongs to its attention (for `trainable: ttt+attention`)."""
        return ".attn" in parameter_name or "attention" in parameter_name or ".self_attn" in parameter_name

    def precompute(self, config: RunConfig[OptionsT, DataT], *, console: Console) -> None:
        """Make the training data from what it is made of, resumable: `ttt precompute CONFIG`.

        Args:
            config: resolved; its `data` section says from what, and where to.
            console: where to report.

        Raises:
            ttt.errors.TTTError: sources are missing or broken; or the backbone has no precomputation.
        """
        self._has_no("precomputation: it reads its data as they are")

    def sample(
        self, model: nn.Module, request: SampleRequest, config: RunConfig[OptionsT, DataT], *, console: Console
    ) -> Sequence[Path]:
        """Make a sample with the adapted model: `ttt sample`.

        Args:
            model: what `build` made, injected, weights loaded, in eval mode.
            request: what is asked for, which `check_sample` has let pass.
            config: resolved.
            console: where to report.

        Returns:
            The files written, the sample first.

        Raises:
            ttt.errors.TTTError: weights are missing, or the disk is full.
        """
        self._has_no("sampling: it cannot make anything from prompts")

    def prepare_samples(
        self,
        model: nn.Module,
        requests: Sequence[SampleRequest],
        config: RunConfig[OptionsT, DataT],
        *,
        console: Console,
    ) -> Callable[[SampleRequest], Sequence[Path]]:
        """What makes one sample after another with the adapted model, so that what all of them need is loaded once.

        By default each is made by `sample`, alone.

        Args:
            model: as for `sample`.
            requests: all that will be asked for, which `check_sample` has let pass.
            config: resolved.
            console: where to report.

        Returns:
            What is then called with each request in that order, but with an `out` of the same name in another folder,
            and returns the files written, all of them in that folder. It answers to a request as `sample` does,
            whatever came before it. Global generators are seeded from the request's seed before each call.

        Raises:
            ttt.errors.TTTError: weights are missing.
        """
        return lambda request: self.sample(model, request, config, console=console)

    def import_weights(self, source: Path, out: Path, *, console: Console) -> Sequence[Path]:
        """Turn another program's checkpoint into this project's files: `ttt import-weights`.

        Each tensor is accounted for on the console: where it went, or why it was left out.

        Args:
            source: the checkpoint, a file or a folder.
            out: folder for the files, made if need be; holds nothing yet.
            console: where to report.

        Returns:
            The files and folders written.

        Raises:
            ttt.errors.TTTError: the backbone does not know such checkpoints, a tensor is missing or does not fit;
                nothing was written then.
        """
        self._has_no("import of weights: it knows no other program's checkpoints")

    def _has_no(self, what: str) -> NoReturn:
        from ttt.errors import UsageError

        raise UsageError(f"the backbone {self.name} has no {what}")

    # --- for the laws' suite and `ttt check --probe` ---

    @abstractmethod
    def tiny(self) -> OptionsT:
        """Options of the smallest model of the same structure, which the laws are tested on."""

    def tiny_like(self, options: OptionsT) -> OptionsT:
        """`tiny` with what of the options could break a law: what is recomputed, where attention ends.

        `ttt check --probe` proves the laws on it.
        """
        return self.tiny()

    @abstractmethod
    def example_batch(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Batch:
        """A random batch of the given size that the model accepts, on its device.

        A bidirectional backbone whose sequences come in steps may give the next longer one that it has.
        """

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model answers to a batch, `[B, T, …]`: row i, position t is all that token t's input decides.

        On a causal backbone position t may depend on inputs 0 … t only.
        """

    @abstractmethod
    def perturb(self, batch: Batch, *, token: int, row: int | None = None) -> Batch:
        """A copy of the batch whose inputs differ from position `token` on, in every row or in one."""

    def stream(self, model: nn.Module, batch: Batch, *, pieces: Sequence[int]) -> Tensor:
        """What `outputs` gives, computed by feeding the model pieces of the given lengths (streaming backbones)."""
        raise NotImplementedError(f"{type(self).__name__} streams, and has no `stream`")
