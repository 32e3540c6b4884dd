"""Moshi's `LMModel` as a backbone: builds it, gives the sites for TTT, and runs TTT in its streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from moshi.models import LMModel, loaders
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import StreamingTransformerLayer
from torch import Tensor, nn

from ttt.adapter import TTTAdapter
from ttt.errors import InjectionError
from ttt.layer import Rotary, TTTLayer
from ttt.plugins import LossOutput, Site
from ttt.state import TTTState
from ttt_moshi.contexts import give_ttt_context, known_contexts, note_context, set_contexts, take_back_context
from ttt_moshi.long_windows import long_window_means, read_long_windows_in_blocks
from ttt_moshi.loss import moshi_means, summed, sums_of_weights
from ttt_moshi.options import (
    DEMO,
    DEMO_CONTEXT,
    LONG_WINDOW,
    NO_TRANSCRIPT,
    NOTHING,
    MoshiOptions,
    model_config_of,
)
from ttt_moshi.streaming import exact_streaming
from ttt_moshi.weights import load_moshi, structure

DEMO_SEED = 20260101
# The structure of `moshi.models.loaders._lm_kwargs`, but narrower; the vocabularies are those of the demo's codec and
# tokenizer.
DEMO_KWARGS: dict[str, Any] = {
    "text_card": 300,
    "card": 64,
    "context": DEMO_CONTEXT,
    "depformer_dim": 64,
    "depformer_dim_feedforward": 192,
    "depformer_num_heads": 4,
    "depformer_num_layers": 2,
    "hidden_scale": 3.0,
}


# --- building ---


def build(options: MoshiOptions, *, device: torch.device | str, dtype: torch.dtype) -> LMModel:
    """The model that the options ask for, in eval mode; on `meta`, only its structure.

    Raises:
        EnvironmentProblem: weights cannot be had.
    """
    return set_contexts(read_long_windows_in_blocks(_build(options, device=device, dtype=dtype)), options)


def _build(options: MoshiOptions, *, device: torch.device | str, dtype: torch.dtype) -> LMModel:
    if options.preset == "demo":
        return _demo_model(options, device=device, dtype=dtype)
    if options.random_weights or torch.device(device).type == "meta":
        return structure(options, device=device, dtype=dtype)
    return load_moshi(options, device=device, dtype=dtype)


def _demo_model(options: MoshiOptions, *, device: torch.device | str, dtype: torch.dtype) -> LMModel:
    """A tiny `LMModel` with Moshi's structure and the same values every time, up to the last digit on other CPUs."""
    kwargs = dict(loaders._lm_kwargs) | DEMO_KWARGS
    kwargs |= {name: getattr(options, name) or default for name, default in DEMO.items()}
    if torch.device(device).type == "meta":
        return LMModel(device=device, dtype=dtype, **kwargs).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DEMO_SEED)
        model = LMModel(device="cpu", dtype=torch.float32, **kwargs)
    return model.to(device=device, dtype=dtype).eval()


def set_gradient_checkpointing(model: LMModel, enabled: bool) -> None:
    """Switch kyutai's activation checkpointing, around every layer of the main transformer and the depformer."""
    model.transformer.checkpointing = enabled
    if model.depformer is not None:
        model.depformer.checkpointing = enabled


# --- where TTT goes ---


@dataclass
class TTTStreamingState(State):
    """A TTT state in kyutai's streaming: one row for each stream, updated in place.

    Tensors keep their addresses, so that a CUDA graph that was recorded with them stays valid. A row that `exec_mask`
    pauses does not change; `reset` resets rows.
    """

    layer: TTTLayer
    state: TTTState

    @torch.no_grad()
    def update(self, new: TTTState, rows: Tensor) -> None:
        """Take the streams for which `rows [B]` is true from `new`."""
        self.state.take_(new, rows)

    @torch.no_grad()
    def reset(self, reset_mask: Tensor) -> None:
        """Reset the streams for which `reset_mask [B]` is true to the layer's own weights."""
        super().reset(reset_mask)
        self.update(self.layer.reset(self.state, reset_mask), reset_mask)


class MoshiTTT(TTTAdapter, StreamingModule[TTTStreamingState]):
    """Moshi's adapter: a `TTTAdapter` that keeps its state in kyutai's streaming state while streaming."""

    _streaming_state: TTTStreamingState | None

    @property
    def streams(self) -> TTTState | None:
        """The streams' state while streaming, with the tokens that they have skipped; None if not streaming."""
        return None if self._streaming_state is None else self._streaming_state.state

    def _init_streaming_state(self, batch_size: int) -> TTTStreamingState:
        device = self.gate.gating_alpha.device
        dtype = torch.promote_types(self.gate.gating_alpha.dtype, torch.float32)
        state = self.layer.streaming_state(batch_size, dtype=dtype)
        return TTTStreamingState(batch_size, device, layer=self.layer, state=state)

    def forward(self, x: Tensor, *, rotary: Rotary | None = None, mask: Tensor | None = None) -> Tensor:
        """Adapt tokens `[B,T,D]`; while streaming, they are the next T tokens of each stream."""
        streaming = self._streaming_state
        if streaming is None:
            return super().forward(x, rotary=rotary, mask=mask)
        if self.gate.closed:
            return x
        if mask is None and x.shape[1] == 1 and self.layer.config.causal and not torch.is_grad_enabled():
            return self.gate(x, self.layer.step_(x, streaming.state, rows=streaming.exec_mask, rotary=rotary))
        out, state = self.adapt(x, streaming.state, rotary=rotary, mask=mask)
        streaming.update(state.detach(), streaming.exec_mask)
        return out


class AdaptedLayer(StreamingTransformerLayer):
    """A layer of Moshi with TTT after self-attention and before the feed-forward."""

    ttt: MoshiTTT

    def _sa_block(self, x: Tensor) -> Tensor:
        return self.ttt(super()._sa_block(x))


@dataclass(frozen=True, eq=False)
class MoshiSite(Site):
    """A layer of Moshi's main transformer."""

    model: LMModel | None = None

    def prepare(self) -> Callable[[], None] | None:
        """Let the layer's attention see what it sees in layers with TTT."""
        assert self.model is not None
        self._forget_children()
        attention = self._layer.self_attn
        before = attention.context
        give_ttt_context(self.model, self._layer)
        return None if attention.context == before else lambda: setattr(attention, "context", before)

    def attach(self, adapter: nn.Module) -> None:
        """Attach the adapter, prepare the layer, and make kyutai's streaming find the new child."""
        self._forget_children()
        note_context(adapter, self._layer)
        super().attach(adapter)
        self.prepare()

    def detach(self, original: type[nn.Module]) -> None:
        """Detach the adapter, and make kyutai's streaming forget the child."""
        self._forget_children()
        take_back_context(getattr(self.module, self.attribute, None), self._layer)
        super().detach(original)

    @property
    def _layer(self) -> StreamingTransformerLayer:
        return cast("StreamingTransformerLayer", self.module)

    def _forget_children(self) -> None:
        """Drop the lists of streaming children that kyutai's modules cache at their first use.

        Raises:
            InjectionError: the model is streaming; its states would not fit the change.
        """
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, StreamingModule):
                if module.is_streaming:
                    raise InjectionError("the model is streaming; leave its `streaming` context before changing it")
                module._cached_children = None


def sites(model: LMModel) -> list[MoshiSite]:
    """One site for each layer of the main transformer."""
    known = known_contexts(model)
    return [
        MoshiSite(
            layer=index,
            path=f"transformer.layers.{index}",
            module=layer,
            dim=model.dim,
            num_heads=layer.self_attn.num_heads,
            subclass=AdaptedLayer,
            adapter=MoshiTTT,
            model=model,
            known_options=known,
        )
        for index, layer in enumerate(model.transformer.layers)
    ]


# --- running ---


def loss(model: LMModel, codes: Tensor, options: MoshiOptions, *, untranscribed_text_weight: float = 1.0) -> LossOutput:
    """The loss of codes `[B,17,T]`: text cross-entropy plus audio cross-entropy over Moshi's own codebooks.

    Where the text is `NO_TRANSCRIPT`, the model reads padding, and the text loss is weighted.
    """
    read = torch.where(codes == NO_TRANSCRIPT, model.text_padding_token_id, codes)
    weights: dict[str, Any] = {
        "text_padding_weight": options.text_padding_weight,
        "first_codebook_weight_multiplier": options.first_codebook_weight_multiplier,
        "text_padding_ids": {model.text_padding_token_id, model.end_of_text_padding_id},
        "untranscribed": codes[:, :1] == NO_TRANSCRIPT,
        "untranscribed_text_weight": untranscribed_text_weight,
    }
    if codes.shape[2] > LONG_WINDOW:
        means = long_window_means(model, read, **weights)
    else:
        means = moshi_means(model(read), read, dep_q=model.dep_q, **weights)
    total, parts = summed(means)
    over = {"text_loss": 0, "audio_loss": 1}
    return LossOutput(total, codes.shape[0] * codes.shape[2], parts, means=means, metrics_over=over)


def loss_weights(codes: Tensor, options: MoshiOptions) -> Tensor:
    """Over what the means of `loss` are taken: the sums of weights of the text and of Moshi's own codebooks, `[2]`."""
    known = model_config_of(options)
    padding = known.existing_text_padding_id
    return sums_of_weights(
        torch.where(codes == NO_TRANSCRIPT, padding, codes),
        delays=known.delays,
        dep_q=known.dep_q,
        text_padding_weight=options.text_padding_weight,
        first_codebook_weight_multiplier=options.first_codebook_weight_multiplier,
        text_padding_ids={padding, known.existing_text_end_padding_id},
        zero_id=NOTHING,
    )


def example_codes(model: LMModel, *, batch_size: int, tokens: int, seed: int) -> Tensor:
    """Random codes `[B,17,T]` within the model's vocabularies."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(4, model.text_card, (batch_size, 1, tokens), generator=generator)
    audio = torch.randint(0, model.card, (batch_size, model.n_q, tokens), generator=generator)
    return torch.cat((text, audio), dim=1).to(model.device)


def outputs(model: LMModel, codes: Tensor) -> Tensor:
    """The main transformer's output and text logits for each frame of codes, `[B,T,D+text_card]`."""
    hidden, text_logits = model.forward_text(codes)
    return torch.cat((hidden, text_logits[:, 0]), dim=-1)


def perturb(codes: Tensor, *, token: int, row: int | None) -> Tensor:
    """A copy whose audio codes differ from frame `token` on."""
    changed = codes.clone()
    rows = slice(None) if row is None else slice(row, row + 1)
    # Flipping the lowest bit keeps a code in a codebook of even size.
    changed[rows, 1:, token:] = codes[rows, 1:, token:] ^ 1
    return changed


def stream(model: LMModel, codes: Tensor, *, pieces: Sequence[int]) -> Tensor:
    """`outputs` of codes that are fed in pieces, through kyutai's streaming state."""
    with torch.no_grad(), exact_streaming(model, codes.shape[0], longest=max(pieces)):
        return torch.cat([outputs(model, piece) for piece in codes.split(list(pieces), dim=2)], dim=1)
