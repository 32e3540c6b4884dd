"""The published formulation of TTT layers, written anew: what `benchmarks/scan.py` measures this library against.

Dual form, one Python step for each mini-batch, plain autograd through the steps, groups of steps under
`torch.utils.checkpoint`; one token at a time in primal form. Options, names of quantities and the order of operations
follow TTT-LM's `ttt.py` (https://github.com/test-time-training/ttt-lm-pytorch, arXiv 2407.04620) and TTT-Video's
`ops/ttt_linear.py` and `ops/ttt_mlp.py` (https://github.com/test-time-training/ttt-video-dit, arXiv 2504.05298), less
what costs them time for nothing: zero gradients carried through the dual form, outputs written into a tensor that
autograd must follow, queries and keys permuted to another layout of rotary pairs and back.

It reads the parameters of a `TTTLayer` and computes the same function; tests/test_benchmarks.py holds the two
together in float64, gradients included. Shapes as in `ttt.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ttt.layer import TTTLayer
from ttt.ops.rotary import rotary_angles

Weights = tuple[Tensor, ...]
Columns = tuple[Tensor, ...]
Rotary = tuple[Tensor, Tensor]


class _Setting(NamedTuple):
    """What every step reads beside its tokens."""

    gamma: Tensor
    """`[H,1,F]`"""
    beta: Tensor
    causal: bool
    eps: float


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    deviation = torch.sqrt(x.var(dim=-1, keepdim=True, unbiased=False) + eps)
    return (x - x.mean(dim=-1, keepdim=True)) / deviation, deviation


def _normed(x: Tensor, setting: _Setting) -> Tensor:
    return setting.gamma * _statistics(x, setting.eps)[0] + setting.beta


def _inner_gradient(z: Tensor, target: Tensor, setting: _Setting) -> Tensor:
    """`∂/∂z ½ ‖LN(z) − target‖²`."""
    width = z.shape[-1]
    normalised, deviation = _statistics(z, setting.eps)
    d_normalised = (setting.gamma * normalised + setting.beta - target) * setting.gamma
    total = d_normalised.sum(dim=-1, keepdim=True)
    along = (d_normalised * normalised).sum(dim=-1, keepdim=True)
    return (width * d_normalised - total - normalised * along) / (width * deviation)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_slope(x: Tensor) -> Tensor:
    root, cubic = 0.7978845608028654, 0.044715  # √(2/π)
    t = torch.tanh(root * x * (1 + cubic * x * x))
    return 0.5 * x * ((1 - t * t) * (root + 3 * root * cubic * x * x)) + 0.5 * (1 + t)


# --- dual form ---


def _lower(matrix: Tensor, setting: _Setting) -> Tensor:
    return torch.tril(matrix) if setting.causal else matrix


def _answered(
    x_query: Tensor, x_key: Tensor, gradient: Tensor, weights: tuple[Tensor, Tensor], eta: Tensor, setting: _Setting
) -> Tensor:
    """What a layer of the inner model gives the queries after each has learned from the keys."""
    matrix, bias = weights
    attention = _lower(x_query @ x_key.transpose(-2, -1), setting)
    bias_after = bias - _lower(eta, setting) @ gradient
    return x_query @ matrix - (eta * attention) @ gradient + bias_after


def _moved(x_key: Tensor, gradient: Tensor, weights: tuple[Tensor, Tensor], eta: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's weights after the mini-batch."""
    matrix, bias = weights
    last = eta[..., -1, :, None]
    moved = matrix - (last * x_key).transpose(-2, -1) @ gradient
    return moved, bias - torch.sum(last * gradient, dim=-2, keepdim=True)


def _linear_step(weights: Weights, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, setting: _Setting) -> tuple:
    first = (weights[0], weights[1])
    gradient = _inner_gradient(k @ first[0] + first[1], v - k, setting)
    z = _answered(q, k, gradient, first, eta, setting)
    return _moved(k, gradient, first, eta), q + _normed(z, setting)


def _mlp_step(weights: Weights, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, setting: _Setting) -> tuple:
    first, second = (weights[0], weights[1]), (weights[2], weights[3])
    z_hidden = k @ first[0] + first[1]
    hidden = _gelu(z_hidden)
    gradient = _inner_gradient(hidden @ second[0] + second[1], v - k, setting)
    gradient_hidden = gradient @ second[0].transpose(-2, -1) * _gelu_slope(z_hidden)
    query_hidden = _gelu(_answered(q, k, gradient_hidden, first, eta, setting))
    z = _answered(query_hidden, hidden, gradient, second, eta, setting)
    following = (*_moved(k, gradient_hidden, first, eta), *_moved(hidden, gradient, second, eta))
    return following, q + _normed(z, setting)


Step = Callable[..., tuple[Weights, Tensor]]


def _scan(step: Step, carry: Weights, columns: Columns, setting: _Setting, group_size: int) -> tuple[Weights, Tensor]:
    """The steps in turn, groups of them recomputed in backward; stacked answers."""

    def run(carry: Weights, start: int, stop: int) -> tuple[Weights, Tensor]:
        answers = []
        for index in range(start, stop):
            carry, answer = step(carry, *(column[index] for column in columns), setting)
            answers.append(answer)
        return carry, torch.stack(answers)

    steps = columns[0].shape[0]
    if not group_size:
        return run(carry, 0, steps)
    parts = []
    for start in range(0, steps, group_size):
        carry, part = checkpoint(run, carry, start, min(start + group_size, steps), use_reentrant=False)
        parts.append(part)
    return carry, torch.cat(parts)


def published_scan(
    weights: Weights,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    *,
    causal: bool,
    eps: float,
    group_size: int,
    compiled: bool = False,
) -> tuple[Tensor, Weights]:
    """Answer a sequence from its queries, keys, values and rates.

    Args:
        weights: `(W1, b1)` of a linear inner model or `(W1, b1, W2, b2)` of an MLP, `[B,H,in,out]` and `[B,H,1,out]`.
        q: queries `[B,H,T,F]`.
        k: keys, likewise.
        v: values, likewise.
        rate: `η [B,H,T,1]`.
        gamma: scale of the inner layer norm, `[H,1,F]`.
        beta: its shift.
        scale: step size by position in a mini-batch, `[C]`.
        causal: whether a token learns only from those up to itself.
        eps: of the layer norm.
        group_size: mini-batches for each checkpoint; 0 for none.
        compiled: run the step through `torch.compile`, as TTT-Video does on GPUs.

    Returns:
        `z [B,H,T,F]` and the weights after the last token.

    Raises:
        ValueError: the inner model is none of the two that are published.
    """
    if len(weights) not in (2, 4):
        raise ValueError(f"linear models and MLPs of two layers are published, not {len(weights) // 2} layers")
    step: Step = _linear_step if len(weights) == 2 else _mlp_step
    if compiled:
        step = torch.compile(step)
    setting = _Setting(gamma, beta, causal, eps)
    length, size = q.shape[2], scale.shape[0]
    whole = length - length % size
    parts = []
    # A last mini-batch that is not full runs by itself, as a scan of one step.
    for start, stop, width in ((0, whole, size), (whole, length, length - whole)):
        if start == stop:
            continue
        cells = [x[:, :, start:stop].unflatten(2, (-1, width)) for x in (q, k, v)]
        eta = scale[:width, None] * rate[:, :, start:stop, 0].unflatten(2, (-1, width)).unsqueeze(-2)
        columns = tuple(x.permute(2, 0, 1, 3, 4) for x in (*cells, eta))
        weights, answers = _scan(step, weights, columns, setting, group_size)
        parts.append(answers.permute(1, 2, 0, 3, 4).flatten(2, 3))
    return torch.cat(parts, dim=2), weights


# --- the layer around it ---


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angles).flatten(-2)


def _normed_target(v: Tensor, k: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """The values whose target `v − k` is layer-normalised: TTT-Video's reconstruction target."""
    target = v - k
    target = (target - target.mean(dim=-1, keepdim=True)) / (target.std(dim=-1, keepdim=True) + eps)
    return gamma * target + beta + k


def projected(layer: TTTLayer, x: Tensor, start: int, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values `[B,H,T,F]` and rates `[B,H,T,1]` of tokens from place `start` of a stream on."""
    config, heads, width = layer.config, layer.num_heads, layer.head_width

    def split(projection: torch.nn.Module) -> Tensor:
        return projection(x).unflatten(-1, (heads, width)).transpose(1, 2)

    q, k, v = split(layer.q_proj), split(layer.k_proj), split(layer.v_proj)
    if config.normalize_qk:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if config.rope == "mini_batch":
        positions = torch.arange(start, start + x.shape[1], device=x.device) % config.mini_batch_size
        rotary = rotary_angles(positions, width, theta=config.rope_theta, dtype=x.dtype)
    if rotary is not None:
        angles = torch.complex(*rotary)
        q, k = _turned(q, angles), _turned(k, angles)
    if config.normalize_target:
        v = _normed_target(v, k, *norms(layer), config.target_eps)
    rate = torch.einsum("btc,hdc->bhtd", x, layer.learnable_ttt_lr_weight)
    rate = torch.sigmoid(rate + layer.learnable_ttt_lr_bias[None, :, :, None])
    return q, k, v, config.base_lr * rate / width


def norms(layer: TTTLayer) -> tuple[Tensor, Tensor]:
    """Scale and shift of the inner layer norm, `[H,1,F]`."""
    shape = (layer.num_heads, 1, layer.head_width)
    return layer.ttt_norm_weight.reshape(shape), layer.ttt_norm_bias.reshape(shape)


def step_sizes(layer: TTTLayer) -> Tensor:
    """The step size by position in a mini-batch, `[C]`."""
    size, like = layer.config.mini_batch_size, layer.ttt_norm_weight
    if not layer.config.causal:
        return torch.full((size,), 1 / size, device=like.device, dtype=like.dtype)
    scale = 1 / torch.arange(1, size + 1, device=like.device, dtype=like.dtype)
    return torch.clamp_min(scale + layer.learnable_token_idx, 0) if layer.config.learnable_token_idx else scale


def _given_out(layer: TTTLayer, z: Tensor) -> Tensor:
    y: Tensor = layer.o_proj(layer.post_norm(z.transpose(1, 2).flatten(2)))
    return y


def _opening_weights(layer: TTTLayer, batch: int) -> Weights:
    return tuple(torch.tile(getattr(layer, name)[None], (batch, 1, 1, 1)) for name in layer.weight_names)


def published_layer(
    layer: TTTLayer, x: Tensor, *, rotary: Rotary | None = None, group_size: int = 0, compiled: bool = False
) -> Tensor:
    """`TTTLayer.forward` from fresh weights, `[B,T,D]` to `[B,T,D]`, in the published formulation.

    Args:
        layer: whose parameters and options to read.
        x: tokens, in the type of the parameters.
        rotary: cosine and sine, with `rope: backbone`.
        group_size: mini-batches for each checkpoint; 0 for none.
        compiled: run the step through `torch.compile`.
    """
    config = layer.config
    q, k, v, rate = projected(layer, x, 0, rotary)
    z, _ = published_scan(
        _opening_weights(layer, x.shape[0]),
        *(q, k, v, rate, *norms(layer), step_sizes(layer)),
        causal=config.causal,
        eps=config.ln_eps,
        group_size=group_size,
        compiled=compiled,
    )
    return _given_out(layer, z)


# --- one token at a time ---


class PublishedDecoder:
    """Streams read one token at a time in primal form: each token's own gradient is added to those of its mini-batch.

    Args:
        layer: whose parameters and options to read; linear, or an MLP of two layers.
        batch_size: B.
    """

    def __init__(self, layer: TTTLayer, batch_size: int) -> None:
        self.layer = layer
        self.weights = _opening_weights(layer, batch_size)
        self.gradients = tuple(torch.zeros_like(w) for w in self.weights)
        self.read = 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The next token of each stream, `[B,1,D]` to `[B,1,D]`."""
        layer, config = self.layer, self.layer.config
        q, k, v, rate = projected(layer, x, self.read, None)
        setting = _Setting(*norms(layer), config.causal, config.ln_eps)
        inputs, gradients = [k], []
        outputs = [k @ self.weights[0] + self.weights[1]]
        if len(self.weights) == 4:
            inputs.append(_gelu(outputs[0]))
            outputs.append(inputs[1] @ self.weights[2] + self.weights[3])
        gradients.append(_inner_gradient(outputs[-1], v - k, setting))
        if len(self.weights) == 4:
            gradients.insert(0, gradients[0] @ self.weights[2].transpose(-2, -1) * _gelu_slope(outputs[0]))
        own: list[Tensor] = []
        for given, gradient in zip(inputs, gradients, strict=True):
            own += [given.transpose(-2, -1) @ (rate * gradient), rate * gradient]
        self.gradients = tuple(g + new for g, new in zip(self.gradients, own, strict=True))
        scale = step_sizes(layer)
        place = self.read % config.mini_batch_size
        moved = tuple(w - scale[place] * g for w, g in zip(self.weights, self.gradients, strict=True))
        z = q @ moved[0] + moved[1]
        if len(moved) == 4:
            z = _gelu(z) @ moved[2] + moved[3]
        self.read += 1
        if self.read % config.mini_batch_size == 0:
            self.weights, self.gradients = moved, tuple(torch.zeros_like(w) for w in moved)
        return _given_out(layer, q + _normed(z, setting))


def read_all(decoder: PublishedDecoder, x: Tensor) -> Tensor:
    """A sequence `[B,T,D]` through a decoder, token by token."""
    answers: Sequence[Tensor] = [decoder(x[:, t : t + 1]) for t in range(x.shape[1])]
    return torch.cat(answers, dim=1)
