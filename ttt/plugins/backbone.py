"""The base class of backbone plugins: everything that `ttt` knows about a model into which TTT is injected.

A plugin is a distribution with an entry point in the group `ttt.backbones`; the entry point names a module that
implements the hook `ttt_backbone` (see `ttt.plugins.hookspecs`) and returns an instance of a `Backbone` subclass.

The module must import without torch and without the backbone's own package: `ttt check` and `ttt plugins`
import it to read options. Import them inside the methods that need them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from ttt.config.schema import BackboneOptions, DataOptions, DataT, OptionsT, RunConfig
from ttt.errors import UsageError
from ttt.plugins.guarding import guard

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ttt.plugins.data import Batch, LossOutput, WindowDataset
    from ttt.plugins.facts import BackboneFacts, NeededFile
    from ttt.plugins.site import Site


class Backbone(ABC, Generic[OptionsT, DataT]):
    """A backbone plugin. The class attributes and the first methods must work without torch.

    `class MyBackbone(Backbone[MyOptions, MyData])` tells a type checker the types of `config.backbone` and
    `config.data`; `class MyBackbone(Backbone)` works as well. A backbone that can do more than be trained, such as
    sampling, inherits a capability too: `ttt.plugins.capabilities`.

    If a method raises something other than a `ttt.errors.TTTError`, or returns a wrong answer, the caller gets a
    `ttt.errors.PluginError` that names the plugin, the method and the line; see `ttt.plugins.asking`.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        guard(cls, Backbone)

    name: ClassVar[str]
    """The name, as in `--backbone NAME` and `backbone: {name: NAME}`."""
    causal: ClassVar[bool]
    """Whether a token may only see itself and earlier tokens. If so, TTT must be causal too."""
    options: ClassVar[type[BackboneOptions]]
    """The `backbone` section."""
    non_identity_options: ClassVar[frozenset[str]] = frozenset()
    """Names of options that do not identify the model: paths of weights, what is recomputed, how it is trained or
    sampled. `ttt.adapter_file.backbone_identity`, and so adapter files, leave them out."""
    data_options: ClassVar[type[DataOptions]] = DataOptions
    """The `data` section."""
    ttt_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the `ttt` section if the user names no preset: `preset`, and settings that differ from it."""
    rules: ClassVar[Sequence[Callable[[RunConfig], Iterable[Any]]]] = ()
    """Extra rules for `ttt check`, made by the decorator `ttt.plugins.rule`; each declares its codes. A plain function
    works as well: it takes the resolved config and returns `ttt.config.Finding`s."""

    # --- without torch ---

    def explanations(self) -> Mapping[str, Any]:
        """What the codes of `rules` mean, for `ttt check --explain`: a `ttt.config.Explanation` for each.

        By default they are read from the files beside the modules of the rules; see `ttt.config.explanation`.

        Raises:
            ValueError: such a file is missing or damaged, or explains other codes than its module declares.
        """
        from ttt.config.explanation import read_explanations
        from ttt.plugins.rules import Rule

        return read_explanations(code for rule in self.rules if isinstance(rule, Rule) for code in rule.codes)

    @abstractmethod
    def presets(self) -> Mapping[str, str]:
        """Complete, commented configs as YAML text, by preset name; `demo` must run anywhere, unchanged."""

    @abstractmethod
    def facts(self, config: RunConfig[OptionsT, DataT]) -> BackboneFacts:
        """Widths and lengths of the model and windows that `config` asks for."""

    def files(self, options: OptionsT) -> Mapping[str, NeededFile]:
        """The files that the options name and that building the model or reading its data needs, by the option's name.

        `ttt check` looks whether each is there, can be read, and is such a file. The default is none.
        """
        return {}

    def identity(self, options: OptionsT) -> Mapping[str, Any]:
        """The options that say which model it is, as an adapter file keeps them: all but `non_identity_options`.

        Override it if that hangs on what the options are: a path of weights may make the sizes of a random model mean
        nothing.
        """
        kept = options.model_dump(mode="json")
        return {key: value for key, value in kept.items() if key not in self.non_identity_options}

    def has_eval_data(self, config: RunConfig[OptionsT, DataT]) -> bool:
        """Whether the split `eval` has data that training does not see. If not, the training data is evaluated."""
        data = config.data
        return data.eval_data is not None or (data.train_data is None and self.has_own_eval_data(config.backbone))

    def has_own_data(self, options: OptionsT) -> bool:
        """Whether the plugin has data of its own, which are read if the config names none.

        `ttt check` advises `train_data: null` only if it has. A plugin without should say with a rule of its own that
        data are missing.
        """
        return True

    def has_own_eval_data(self, options: OptionsT) -> bool:
        """Whether the plugin's own data, which is read if the config names none, has a part for evaluation."""
        return False

    # --- with torch ---

    @abstractmethod
    def build(self, options: OptionsT, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """Build the model with its weights loaded, in eval mode. On the device `meta`, build only its structure.

        Raises:
            ttt.errors.EnvironmentProblem: weights or packages are missing.
        """

    def provenance(self, options: OptionsT) -> Mapping[str, str]:
        """The origin of the weights that `build` loads, as `repository` and `commit`, for adapter files.

        It must download nothing. It is empty if the origin is unknown.
        """
        return {}

    def describe_model(self, model: nn.Module) -> Sequence[str]:
        """What a user must know of a built model and cannot see in its config, measured on the model: a sentence each.

        As what the attention of each layer sees. A run announces it, and its adapter files keep it for `ttt info`. TTT
        is in the model already.
        """
        return ()

    @abstractmethod
    def sites(self, model: nn.Module) -> Sequence[Site]:
        """The sites where TTT can be attached, one for each layer, in order. Does not change the model."""

    @abstractmethod
    def dataset(self, config: RunConfig[OptionsT, DataT], *, split: str, device: torch.device | str) -> WindowDataset:
        """The windows of a split, `train` or `eval`.

        Raises:
            ttt.errors.EnvironmentProblem: files are missing or broken; the message names file and line.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, config: RunConfig[OptionsT, DataT]) -> LossOutput:
        """The training loss of a batch on the model's device.

        Draw random numbers with `ttt.plugins.rows.rows_of_step`: those of a row are then the same in however many
        passes and processes its step is read. It can also spread draws over all rows of the step. Torch's global
        generators are seeded by the first row of each pass, so that a resumed run draws the same numbers as an
        uninterrupted one; but a step that is read in other passes draws others from them.
        """

    def loss_weights(self, batch: Batch, config: RunConfig[OptionsT, DataT]) -> Tensor:
        """Over what each mean in the loss of a batch is taken: sums of weights `[K]`, without the model.

        A step may read its rows in several passes and processes. The mean over all of them is `Σ w·mean / Σ w`, with
        the w of each pass from here. If the loss is a sum of several means, as Moshi's is one over text and one over
        audio, each has an entry, and `LossOutput.means` has the means. The default is one entry, the number of rows:
        right for a loss in which every row counts alike. A cross-entropy that leaves out padding returns how many
        tokens count. What has no weight in a batch must have a finite mean there, such as 0.

        Args:
            batch: as `loss` gets it, possibly still on the CPU.
            config: of the run.
        """
        import torch

        from ttt.plugins.data import rows_of

        return torch.tensor([float(rows_of(batch))])

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        """Switch the backbone's own activation checkpointing.

        Raises:
            ttt.errors.UsageError: `enabled` is true, but the backbone has no activation checkpointing.
        """
        if enabled:
            raise UsageError(
                f"train.gradient_checkpointing: the backbone {self.name} has no activation checkpointing; write false"
            )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The modules, each called as one, into which several processes split the model: one after another is gathered.

        Inner ones come before those that hold them. The default is the layers of the sites, each up to its number in
        the site's path, as `transformer.layers.3`. What is in none of them is gathered for the whole forward pass.
        """
        paths = dict.fromkeys(site.layer_path for site in self.sites(model))
        return [model.get_submodule(path) for path in paths]

    def is_attention(self, parameter_name: str) -> bool:
        """Whether a backbone parameter belongs to its attention (for `trainable: ttt+attention`)."""
        return ".attn" in parameter_name or "attention" in parameter_name or ".self_attn" in parameter_name

    # --- for the laws' suite and `ttt check --probe` ---

    @abstractmethod
    def tiny(self) -> OptionsT:
        """Options of the smallest model with the same structure. The laws are tested on it."""

    def tiny_like(self, options: OptionsT) -> OptionsT:
        """`tiny`, with those options that could break a law: what is recomputed, where attention ends.

        `ttt check --probe` proves the laws on it.
        """
        return self.tiny()

    @abstractmethod
    def example_batch(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Batch:
        """A random batch of the given size that the model accepts, on its device.

        If a bidirectional backbone allows only certain lengths, the batch may have the next longer one.
        """

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's outputs for a batch, `[B, T, …]`. Position t of a row holds every output at token t.

        On a causal backbone position t may depend on inputs 0 … t only.
        """

    @abstractmethod
    def perturb(self, batch: Batch, *, token: int, row: int | None = None) -> Batch:
        """A copy of the batch whose inputs differ from position `token` on, in every row or in one."""
