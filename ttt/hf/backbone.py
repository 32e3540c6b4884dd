"""The base class of backbones that are causal language models of `transformers`; imports neither it nor torch.

A plugin for one architecture says its name and the architecture's, and brings a preset:

    class MistralOptions(CausalLMOptions):
        name: Literal["mistral"] = "mistral"

    class MistralBackbone(CausalLMBackbone[MistralOptions, TextData]):
        name: ClassVar[str] = "mistral"
        model_type: ClassVar[str] = "mistral"
        options: ClassVar[type[BackboneOptions]] = MistralOptions

        def presets(self) -> Mapping[str, str]:
            return packaged_presets("ttt_mistral", ("demo",))

    @hookimpl
    def ttt_backbone() -> Backbone:
        return MistralBackbone()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from ttt.config import BackboneOptions, DataOptions, RunConfig
from ttt.hf.documents import LONGEST_LINE, example_line
from ttt.hf.facts import known_config, provenance, required_sizes
from ttt.hf.options import NOTHING, CausalLMOptions, CausalLMOptionsT, TextData, TextDataT
from ttt.hf.rules import RULES
from ttt.plugins.backbone import Backbone
from ttt.plugins.capabilities import LowRank, Scoring, Streaming
from ttt.plugins.data import Batch, LossOutput
from ttt.plugins.facts import BackboneFacts, LineFormat
from ttt.plugins.scoring import ScoreFacts

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor, nn

    from ttt.config.lora import Linears
    from ttt.plugins.data import WindowDataset
    from ttt.plugins.lora_site import LoraSite
    from ttt.plugins.scoring import ClipReader, Scores, ScoreStream
    from ttt.plugins.site import Site

_WEIGHTS_ONLY = frozenset({"model", "gguf_file", "revision", "attn_implementation", "tokenizer"})
"""Options that say where weights are, how attention is computed and how text is read: not which model it is."""
_ATTENTION = frozenset({"self_attn", "attn", "attention", "self_attention"})
"""What decoder layers call their attention."""


class CausalLMBackbone(
    Backbone[CausalLMOptionsT, TextDataT],
    Streaming,
    Scoring[CausalLMOptionsT, TextDataT],
    LowRank[CausalLMOptionsT],
    Generic[CausalLMOptionsT, TextDataT],
):
    """Any causal language model of `transformers`, with TTT after its decoder layers.

    A batch is a mapping: `input_ids [B,T]`; `attention_mask [B,T]`, 0 where a window is padded; `shift_labels [B,T]`,
    the token that follows each, −100 where none counts.
    """

    causal: ClassVar[bool] = True
    model_type: ClassVar[str]
    """The architecture, as `transformers` names it in a config.json: a small random model of it is `tiny()`."""
    options: ClassVar[type[BackboneOptions]] = CausalLMOptions
    data_options: ClassVar[type[DataOptions]] = TextData
    non_identity_options: ClassVar[frozenset[str]] = _WEIGHTS_ONLY
    rules: ClassVar[Sequence[Callable[[RunConfig], Iterable[Any]]]] = RULES

    # --- without torch ---

    def identity(self, options: CausalLMOptionsT) -> Mapping[str, Any]:
        """Of a pretrained model its weights say which it is, of a random one its config and seed do."""
        found = dict(super().identity(options))
        return {key: value for key, value in found.items() if options.model is None or key not in ("config", "seed")}

    def facts(self, config: RunConfig[CausalLMOptionsT, TextDataT]) -> BackboneFacts:
        """Sizes from the options, the model's folder or the hub's cache; tokens by `window_tokens`.

        Raises:
            ttt.errors.EnvironmentProblem: none of them tells the sizes.
        """
        sizes, length, key = required_sizes(config.backbone), config.data.window_tokens, config.data.text_key
        return BackboneFacts(
            dim=sizes["hidden_size"],
            num_heads=sizes["num_attention_heads"],
            num_layers=sizes["num_hidden_layers"],
            tokens_per_window=length,
            window=f"{length:,} tokens of text",
            lines=LineFormat(example_line(key), {key: str}, longest=LONGEST_LINE),
        )

    def own_text(self, options: CausalLMOptionsT, split: str) -> Path | None:
        """The text that is read for a split, `train` or `eval`, if the config names none; None if there is none.

        By default random models have one: the demo's.
        """
        from ttt.hf.demo import text_of

        return text_of(split) if options.model is None else None

    def has_own_data(self, options: CausalLMOptionsT) -> bool:
        """Whether there is a text of its own for training."""
        return self.own_text(options, "train") is not None

    def has_own_eval_data(self, options: CausalLMOptionsT) -> bool:
        """Whether there is a text of its own for evaluation."""
        return self.own_text(options, "eval") is not None

    def provenance(self, options: CausalLMOptionsT) -> Mapping[str, str]:
        """The repository, and the commit of it that is in the hub's cache."""
        return provenance(options)

    def tiny(self) -> CausalLMOptionsT:
        """A random model of the architecture, two heads wide and two layers deep."""
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
        return self.options.model_validate(  # type: ignore[return-value]
            {"name": self.name, "config": {"model_type": self.model_type, **sizes}}
        )

    def tiny_like(self, options: CausalLMOptionsT) -> CausalLMOptionsT:
        """`tiny`, of the same architecture if that is known, with attention that ends where it does."""
        kind = known_config(options).get("model_type")
        tiny = self.tiny()
        config = {**(tiny.config or {}), **({"model_type": kind} if isinstance(kind, str) else {})}
        ends = {"attention_window": options.attention_window, "attention_sinks": options.attention_sinks}
        return tiny.model_copy(update={"config": config, **ends})

    # --- with torch ---

    def build(self, options: CausalLMOptionsT, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """The model of `AutoModelForCausalLM`, in eval mode."""
        from ttt.hf.building import build

        return build(options, device=device, dtype=dtype)

    def describe_model(self, model: nn.Module) -> Sequence[str]:
        """What attention sees, if it is limited."""
        from ttt.hf.attention import describe_limit

        return describe_limit(model)

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """One for each decoder layer: its output."""
        from ttt.hf.sites import causal_lm_sites

        return causal_lm_sites(model)

    def dataset(
        self, config: RunConfig[CausalLMOptionsT, TextDataT], *, split: str, device: torch.device | str
    ) -> WindowDataset:
        """Windows of the documents that the config names, or of the backbone's own text."""
        from ttt.hf.windows import text_windows

        return text_windows(config, split=split, own=self.own_text(config.backbone, split))

    def loss(self, model: nn.Module, batch: Batch, config: RunConfig[CausalLMOptionsT, TextDataT]) -> LossOutput:
        """Cross-entropy of each next token, the mean over those that count."""
        from ttt.hf.running import loss

        return loss(model, batch)

    def loss_weights(self, batch: Batch, config: RunConfig[CausalLMOptionsT, TextDataT]) -> Tensor:
        """How many next tokens count."""
        from ttt.hf.running import loss_weights

        return loss_weights(batch)

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        """Switch the checkpointing of `transformers` around each decoder layer; it acts in training mode."""
        from ttt.hf.running import set_gradient_checkpointing

        set_gradient_checkpointing(model, enabled)

    def is_attention(self, parameter_name: str) -> bool:
        """The projections, biases and norms inside the decoder layers' attention."""
        return not _ATTENTION.isdisjoint(parameter_name.split("."))

    def lora_sites(self, model: nn.Module, linears: Linears) -> Sequence[LoraSite]:
        """The model's `nn.Linear`; for all but `all`, those inside the decoder layers."""
        from ttt.hf.lora import lora_sites

        return lora_sites(model, linears, is_attention=self.is_attention)

    # --- for the laws ---

    def example_batch(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Batch:
        """Random tokens, none of them padding."""
        from ttt.hf.running import example_batch

        return example_batch(model, batch_size=batch_size, tokens=tokens, seed=seed)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits, `[B,T,vocabulary]`."""
        from ttt.hf.running import outputs

        return outputs(model, batch)

    def perturb(self, batch: Batch, *, token: int, row: int | None = None) -> Batch:
        """Other tokens from one on."""
        from ttt.hf.running import perturb

        return perturb(batch, token=token, row=row)

    def stream(self, model: nn.Module, batch: Batch, *, pieces: Sequence[int]) -> Tensor:
        """The logits, read in pieces with a cache."""
        from ttt.hf.running import stream

        return stream(model, batch, pieces=pieces)

    # --- scores ---

    def score_facts(self, config: RunConfig[CausalLMOptionsT, TextDataT]) -> ScoreFacts:
        """One stream, text. What attention sees is known if `attention_window` says it."""
        return ScoreFacts(
            medium="text",
            streams=("text",),
            weights={"text": (1.0,)},
            chosen="text",
            attention_span=config.backbone.attention_window,
            padding=NOTHING,
        )

    def clip_reader(self, config: RunConfig[CausalLMOptionsT, TextDataT], *, device: torch.device | str) -> ClipReader:
        """Text files as tokens `[1,T]`."""
        from ttt.hf.clips import TextClips

        return TextClips.of(config)

    def score(self, model: nn.Module, clips: Tensor) -> Scores:
        """Cross-entropy of tokens `[B,1,T]` given those before, `[B,1,T]`; of the first there is none."""
        from ttt.hf.scoring import score

        return score(model, clips)

    def score_stream(self, model: nn.Module, *, batch_size: int) -> AbstractContextManager[ScoreStream]:
        """The same in pieces, with a cache."""
        from ttt.hf.scoring import score_stream

        return score_stream(model, batch_size=batch_size)

    def example_clips(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Tensor:
        """Random tokens `[B,1,T]`."""
        clips: Tensor = self.example_batch(model, batch_size=batch_size, tokens=tokens, seed=seed)["input_ids"]
        return clips[:, None]
