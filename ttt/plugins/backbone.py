"""What a backbone plugin provides: everything `ttt` knows about a model that TTT goes into.

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
    from ttt.plugins.facts import BackboneFacts
    from ttt.plugins.site import Site


class Backbone(ABC, Generic[OptionsT, DataT]):
    """A backbone plugin. The class attributes and the first methods must work without torch.

    `class MyBackbone(Backbone[MyOptions, MyData])` tells a type checker what `config.backbone` and `config.data` are in
    its methods; `class MyBackbone(Backbone)` works as well. What it can do beside being trained, sampling for one, it
    inherits too: `ttt.plugins.capabilities`.

    What a method raises that is no `ttt.errors.TTTError`, and an answer that is not what the method promises, reach
    the caller as a `ttt.errors.PluginError` that names the plugin, the method and the line; see `ttt.plugins.asking`.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        guard(cls, Backbone)

    name: ClassVar[str]
    """As in `--backbone NAME` and `backbone: {name: NAME}`."""
    causal: ClassVar[bool]
    """Whether a token may only see those before it; then TTT must be causal too."""
    options: ClassVar[type[BackboneOptions]]
    """The `backbone` section."""
    non_identity_options: ClassVar[frozenset[str]] = frozenset()
    """Names of options that do not say which model it is: where its weights lie, what is recomputed, how it is trained
    or sampled. `ttt.adapter_file.backbone_identity`, and so adapter files, leave them out."""
    data_options: ClassVar[type[DataOptions]] = DataOptions
    """The `data` section."""
    ttt_defaults: ClassVar[Mapping[str, Any]] = {}
    """The `ttt` section where the user names no preset: `preset` and what differs from it for this backbone."""
    rules: ClassVar[Sequence[Callable[[RunConfig], Iterable[Any]]]] = ()
    """Extra rules for `ttt check`, made by the decorator `ttt.plugins.rule`: each declares its codes. A plain function
    of the resolved config that returns `ttt.config.Finding`s works as well."""

    # --- without torch ---

    def explanations(self) -> Mapping[str, Any]:
        """What the codes of `rules` mean, a `ttt.config.Explanation` for each: `ttt check --explain`.

        By default what the files beside the modules of the rules say; see `ttt.config.explanation`.

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

    def has_eval_data(self, config: RunConfig[OptionsT, DataT]) -> bool:
        """Whether the split `eval` holds data that training does not see; else the training data is evaluated."""
        data = config.data
        return data.eval_data is not None or (data.train_data is None and self.has_own_eval_data(config.backbone))

    def has_own_eval_data(self, options: OptionsT) -> bool:
        """Whether the data that the plugin brings, read if the config names none, has a part for evaluation."""
        return False

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
        however many passes the step reads them, it draws by what `ttt.plugins.rows.rows_of_step` says.
        """

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        """Switch the backbone's own activation checkpointing.

        Raises:
            ttt.errors.UsageError: the backbone has none and `enabled` asks for it.
        """
        if enabled:
            raise UsageError(
                f"train.gradient_checkpointing: the backbone {self.name} has no activation checkpointing; write false"
            )

    def is_attention(self, parameter_name: str) -> bool:
        """Whether a backbone parameter belongs to its attention (for `trainable: ttt+attention`)."""
        return ".attn" in parameter_name or "attention" in parameter_name or ".self_attn" in parameter_name

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
