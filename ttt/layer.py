"""The TTT layer: tokens and a state in, tokens and a state out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ttt.config import TTTConfig
from ttt.config.schema import inner_widths
from ttt.costs import best_group_size, scan_cost
from ttt.layer_held import PROJECTIONS, Held
from ttt.layer_inputs import check_counts, check_head_width, check_state, check_step, check_tokens, nonfinite
from ttt.layer_sharing import WHOLE, Projection, Sharing, held
from ttt.layer_step import KnownStates, step
from ttt.layer_tokens import Rotary, tokens_of
from ttt.ops.autocast import no_autocast
from ttt.ops.constants import Precision
from ttt.ops.decode_rows import Memory
from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.rows import Tokens
from ttt.ops.tracing import InnerTrace, MinibatchTrace, effective_weights, trace, trace_minibatches
from ttt.state import Reading, TTTState, weight_names

INITIAL_STD = 0.02


class TTTLayer(nn.Module):
    """A layer whose hidden state is a small model that learns from every mini-batch of tokens it reads.

    `y = W_o · LN(z)`, where `z_t = q_t + LN_γβ(f_{W_t}(q_t))` and `W_t` has learned from the tokens so far by
    `ℓ = ½ ‖LN_γβ(f_W(k)) − (v − k)‖²`. `forward` is pure: it writes to no parameter and no buffer, and its fast
    weights come in and go out as a `TTTState`. Parameters carry the names and shapes of the literature's code.

    With `skip_nonfinite_tokens`, a token that holds a NaN or an infinity keeps its place in the mini-batch but teaches
    nothing, as if its inner learning rate were zero. Its answer is zeros, so that a residual around the layer passes
    it on unchanged. `TTTState.skipped` counts these tokens.

    A token that a mask leaves out, such as padding, has no place in any mini-batch: outputs, states and gradients are
    those of the sequences without such tokens, whatever these hold.

    Fast weights, their gradients, norms and rotary run in float32 or wider, whatever the type of the tokens or of
    autocast; the projections run in the type of the tokens.

    Args:
        dim: model width D.
        num_heads: heads H; `config.num_heads` overrides it.
        config: everything else.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: D does not divide by H, or rotary pairs do not fit an odd head width.

    Source: TTT-LM (arXiv 2407.04620) and TTT-Video (arXiv 2504.05298).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        config: TTTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.compiled: (
            Callable[[TTTLayer, Tensor, TTTState, Rotary | None, Tensor | None, int], tuple[Tensor, Stream]] | None
        ) = None
        """`_read` compiled, which `forward` calls instead if it is set; see `ttt.train.compiling`."""
        self.precision: Precision = "ieee"
        """In what the operands of the inner model's products are multiplied; a run sets its `train.ttt_precision`."""
        self.observers: list[Callable[[TTTLayer, Reading], None]] = []
        """Called by `forward` and `step_` with what they are about to read, before a state is written to."""
        self.sharing: Sharing = WHOLE
        """How tokens and heads are shared out among processes: not at all, unless by `ttt.parallel`."""
        self.held: Held | None = None
        """What is derived from parameters once, if the layer is held for inference."""
        self._known_states = KnownStates()
        heads = config.num_heads or num_heads
        check_head_width(dim, heads, config)
        self.config = config
        self.dim = dim
        self.num_heads = heads
        self.head_width = width = dim // heads
        self._costs = scan_cost(config, dim=dim, num_heads=heads, tokens=config.mini_batch_size, batch_size=1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        for name in PROJECTIONS:
            linear = nn.utils.skip_init(
                Projection, dim, dim, bias=config.qkvo_bias, device=device or "cpu", dtype=dtype
            )
            self.add_module(name, linear)
        widths = inner_widths(width, config)
        self.weight_names = weight_names(2 * (len(widths) - 1))
        for index, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), 1):
            self.register_parameter(f"W{index}", parameter(heads, fan_in, fan_out))
            self.register_parameter(f"b{index}", parameter(heads, 1, fan_out))
        self.ttt_norm_weight = parameter(heads, width)
        self.ttt_norm_bias = parameter(heads, width)
        self.learnable_ttt_lr_weight = parameter(heads, 1, dim)
        self.learnable_ttt_lr_bias = parameter(heads, 1)
        if config.learnable_token_idx:
            self.learnable_token_idx = parameter(config.mini_batch_size)
        self.post_norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw matrices from normal(0, 0.02), set biases and offsets to zero and norms to the identity.

        Args:
            generator: a CPU generator; values are drawn on the CPU, so that they are the same on every device.
        """
        for name, value in self.named_parameters():
            if value.is_meta:
                continue
            if name in ("ttt_norm_weight", "post_norm.weight"):
                value.fill_(1)
            elif name.endswith(("_proj.weight", "ttt_lr_weight")) or name.startswith("W"):
                value.copy_(torch.empty(value.shape).normal_(0, INITIAL_STD, generator=generator))
            else:
                value.zero_()

    def hold_for_inference(self, dtype: torch.dtype) -> None:
        """Hold what depends on parameters alone as a token needs it, for inference alone and for good.

        Otherwise every call casts four weights of D² numbers to the type of the tokens, and every token makes norms,
        rates and step sizes ready anew. The projections are held in that type; if it rounds them, what was held before
        is given up: so the layer reads tokens of this type alone from now on, and is not to be trained or saved. For
        single tokens the projections of queries, keys and values are one product, of which their weights become parts.
        `forward` reads as it did, bit for bit, and `step_` as `forward` to rounding.
        `ttt.inject.Injection.for_inference` does this for a model; see `ttt.layer_held.Held` for what follows a change.

        Args:
            dtype: of the tokens.
        """
        for name in PROJECTIONS:
            projection = getattr(self, name)
            if isinstance(projection, Projection):  # another program's stays as it is
                projection.hold(dtype)
        self.held = Held(dtype)
        self.held.parts(self, dtype, 1)

    def initial_state(self, batch_size: int, *, dtype: torch.dtype = torch.float32) -> TTTState:
        """The state of B streams that have read nothing: the layer's own W and b, differentiable, not copied."""
        weights = (self.sharing.heads(getattr(self, name)) for name in self.weight_names)
        state = TTTState(tuple(w.to(dtype).expand(batch_size, *w.shape) for w in weights))
        return state.counting() if self.config.skip_nonfinite_tokens else state

    def streaming_state(self, batch_size: int, *, dtype: torch.dtype = torch.float32) -> TTTState:
        """`initial_state` for `step_` to write to: in memory of its own, with the open mini-batches written out."""
        with torch.no_grad():
            state = self.initial_state(batch_size, dtype=dtype)
            return state.streaming(self.config.mini_batch_size if self.config.causal else 1)

    def reset(self, state: TTTState, rows: Tensor) -> TTTState:
        """The state, with the streams for which `rows [B]` is true set back to the initial state."""
        return self.initial_state(state.batch_size, dtype=state.weights[0].dtype).where(rows, state)

    def forward(
        self,
        x: Tensor,
        state: TTTState | None = None,
        *,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, TTTState]:
        """Read a sequence, or the next piece of one.

        Args:
            x: tokens `[B,T,D]`, T ≥ 1.
            state: the streams' state before x; None starts them fresh.
            rotary: cosine and sine `[…,T,F/2]`, broadcastable to `[B,H,T,F/2]`; given if and only if the config says
                `rope: backbone`.
            mask: bool `[B,T]`, true for the tokens that count; None means all. The others neither learn nor count nor
                move a mini-batch boundary, and what they and their rotary angles hold reaches nothing, NaN neither.

        Returns:
            `y [B,T,D]` in the type of `x`, zeros for tokens that do not count, and the state after the last token.

        Raises:
            ValueError: the tokens, the state or the mask do not fit the layer, or `rotary` does not fit the config.
        """
        given, state = state, self._checked(x, state, rotary, mask)
        for observe in self.observers:
            observe(self, Reading(x, given, rotary, None, mask))
        state = state.summed()
        read = self.compiled or TTTLayer._read
        group_size = self._group_size(self.sharing.tokens(x.shape[1]))
        with no_autocast(x):  # outside the compiled part: a compiled backward runs in the types of its forward
            y, stream = read(self, x, state, rotary, mask, group_size)
        return y, TTTState.of(stream, skipped=self._skipped(x, state, mask))

    def step_(self, x: Tensor, state: TTTState, *, rows: Tensor | None = None, rotary: Rotary | None = None) -> Tensor:
        """Read one token of each stream and write the new state into `state` itself.

        For streaming: no memory grows, and the state's tensors keep their addresses, as a CUDA graph requires. The
        answers and the state are the same as those of `forward`.

        Args:
            x: tokens `[B,1,D]`.
            state: from `streaming_state` or `TTTState.streaming`; its values change. A copy of another state does too,
                without factors: each token is then summed at once.
            rows: `[B]`, the streams that read their token; the others keep their state. None means all.
            rotary: as in `forward`.

        Returns:
            `y [B,1,D]` in the type of `x`; rows that read no token hold no meaningful numbers.

        Raises:
            RuntimeError: gradients are enabled, and one would be lost; call it under `torch.no_grad()`.
            ValueError: the tokens or the state do not fit the layer, the update is not causal, or the state shares
                memory with the layer's parameters, or its streams share memory.
        """
        self.sharing.require_step()
        memory = self._memory(x, state, rotary)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *state.weights, *self.parameters())):
            raise RuntimeError("step_ writes to its state, and a gradient would be lost; call it under torch.no_grad()")
        for observe in self.observers:
            observe(self, Reading(x, state, rotary, rows, None if rows is None else rows[:, None]))
        with torch.no_grad(), no_autocast(x):
            return step(self, x, state, memory, rows, rotary)

    def trace(
        self,
        x: Tensor,
        state: TTTState | None = None,
        *,
        start: TTTState | None = None,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
    ) -> InnerTrace:
        """The inner loss of each token at `W₀`, `W_{t−1}` and `W_t`, `[B,T]` each.

        It is NaN for tokens that are skipped or that do not count.

        Args:
            x: as in `forward`.
            state: as in `forward`: the state before x.
            start: the state with which the streams started, whose weights are `W₀`; None if with the layer's own. If x
                is not the first piece, it is not `state`.
            rotary: as in `forward`.
            mask: as in `forward`.

        Raises:
            ValueError: as in `forward`; `start` does not fit either.
        """
        state, start = self._checked(x, state, rotary, mask), self._checked(x, start, rotary, mask)
        with torch.no_grad(), no_autocast(x):
            tokens = self._tokens(x, state, rotary, mask)
            inner = self._inner(tokens.q.dtype)
            every = None if mask is None else self.sharing.all_tokens(mask)
            found = trace(tokens, state.stream, inner, start=self.effective_weights(start), mask_BT=every)
            found = InnerTrace(*(self.sharing.own_tokens(self.sharing.mean_over_heads(losses)) for losses in found))
            if not self.config.skip_nonfinite_tokens:
                return found
            skipped = nonfinite(x).squeeze(-1)
            return InnerTrace(*(losses.masked_fill(skipped, torch.nan) for losses in found))

    def trace_minibatches(
        self,
        x: Tensor,
        state: TTTState | None = None,
        *,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
    ) -> MinibatchTrace:
        """The inner loss before and after each mini-batch's step, `[N]` each; arguments as in `forward`."""
        state = self._checked(x, state, rotary, mask)
        with torch.no_grad(), no_autocast(x):
            tokens = self._tokens(x, state, rotary, mask)
            every = None if mask is None else self.sharing.all_tokens(mask)
            found = trace_minibatches(tokens, state.stream, self._inner(tokens.q.dtype), mask_BT=every)
            return MinibatchTrace(*(self.sharing.mean_over_heads(losses) for losses in found))

    def effective_weights(self, state: TTTState) -> tuple[Tensor, ...]:
        """The weights that answered the last token of each stream: with the step of an open mini-batch taken."""
        return effective_weights(state.stream, self.scale(state.weights[0].dtype))

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, layer_type={self.config.layer_type}, "
            f"mini_batch_size={self.config.mini_batch_size}, causal={self.config.causal}"
        )

    def _read(
        self, x: Tensor, state: TTTState, rotary: Rotary | None, mask: Tensor | None, group_size: int
    ) -> tuple[Tensor, Stream]:
        """The part of `forward` that can be compiled: after the arguments are checked, with autocast off."""
        tokens = self._tokens(x, state, rotary, mask)
        inner = self._inner(tokens.q.dtype)
        every = None if mask is None else self.sharing.all_tokens(mask)
        z_BHTF, stream = learn(tokens, state.stream, inner, group_size=group_size, mask_BT=every)
        return self._answer(z_BHTF, x, mask), stream

    def _checked(
        self, x: Tensor, state: TTTState | None, rotary: Rotary | None, mask: Tensor | None = None
    ) -> TTTState:
        self.sharing.reading(x)
        check_tokens(x, self.dim, self.config, rotary=rotary, mask=mask)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if state is None:
            return self.initial_state(x.shape[0], dtype=dtype)
        # Shapes that broadcast, or an inner model of another depth, would run and answer something else.
        own = [self.sharing.heads(getattr(self, name)).shape for name in self.weight_names]
        check_state(state, x, own, mini_batch_size=self.config.mini_batch_size)
        return state

    def _memory(self, x: Tensor, state: TTTState, rotary: Rotary | None) -> Memory:
        """A state's memory, after `step_`'s arguments are checked; what was checked and cannot have changed is not."""
        own = [held(getattr(self, name)) for name in self.weight_names]
        known = self._known_states.memory(state, x, own) if self.sharing.alone else None
        if known is not None and (rotary is not None) == (self.config.rope == "backbone"):
            check_counts(state, self.config.mini_batch_size)
            return known
        check_step(self._checked(x, state, rotary), x, self.config, own)
        return self._known_states.add(state, x, own)

    def project(self, name: str, x: Tensor) -> Tensor:
        """Tokens through one of the four projections, in their own type."""
        projected: Tensor = getattr(self, name)(x)
        return projected

    def _tokens(self, x: Tensor, state: TTTState, rotary: Rotary | None, mask: Tensor | None = None) -> Tokens:
        """Queries, keys, targets and rates of the tokens; of those that do not count they have no meaning."""
        return tokens_of(self, x, state, rotary, mask)

    def _group_size(self, length: int) -> int:
        """`scan_checkpoint_group_size`; if it is `auto`, the group that needs least memory for T tokens."""
        size = self.config.scan_checkpoint_group_size
        if size != "auto":
            return size
        one = self._costs  # all three grow with B alike
        steps = length // self.config.mini_batch_size
        return best_group_size(steps, carry=one.carry_bytes, activation=one.activation_bytes, running=one.running_bytes)

    def _skipped(self, x: Tensor, state: TTTState, mask: Tensor | None) -> Tensor | None:
        """How many tokens each stream has skipped in all, these included; one that does not count is not skipped."""
        if not self.config.skip_nonfinite_tokens:
            return state.skipped
        before = state.no_tokens() if state.skipped is None else state.skipped
        skipped = nonfinite(x).squeeze(-1)
        return before + self.sharing.sum_over_tokens((skipped if mask is None else skipped & mask).sum(1))

    def _answer(self, z_BHTF: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`W_o · LN(z)`, heads concatenated, in the type of `x`; zeros for tokens that are skipped or do not count."""
        z = self.sharing.to_tokens(z_BHTF).transpose(1, 2).flatten(2)
        norm = self.post_norm
        z = self.sharing.layer_norm(z, held(norm.weight).to(z), held(norm.bias).to(z), eps=norm.eps)
        y = self.project("o_proj", z.to(x.dtype))
        if self.config.skip_nonfinite_tokens:
            y = torch.where(nonfinite(x), 0, y)
        return y if mask is None else torch.where(mask[..., None], y, 0)

    def norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """γ and β of the inner norm, `[H,1,F]`."""
        return held(self.ttt_norm_weight).to(dtype).unsqueeze(1), held(self.ttt_norm_bias).to(dtype).unsqueeze(1)

    def scale(self, dtype: torch.dtype) -> Tensor:
        """The step size by position, `[C]`."""
        size, device = self.config.mini_batch_size, self.ttt_norm_weight.device
        if not self.config.causal:
            return torch.full((size,), 1 / size, dtype=dtype, device=device)
        scale = 1 / torch.arange(1, size + 1, dtype=dtype, device=device)
        if self.config.learnable_token_idx:
            scale = (scale + self.sharing.entering(self.learnable_token_idx).to(dtype)).clamp_min(0)
        return scale

    def _inner(self, dtype: torch.dtype) -> Inner:
        gamma_H1F, beta_H1F = (self.sharing.heads(x) for x in self.norm(dtype))
        return Inner(gamma_H1F, beta_H1F, self.scale(dtype), self.config.causal, self.config.ln_eps, self.precision)
