"""Who `benchmarks/scan.py` times, and on which shapes: passes forward, and forward and backward, ready to run."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from products import Products
from published import norms, projected, published_layer, published_scan, step_sizes
from torch import Tensor
from torch.nn import functional as F

from ttt.check.doctor import forced
from ttt.config import TTTConfig
from ttt.config.schema import inner_widths
from ttt.costs import ScanCost, scan_cost
from ttt.layer import Rotary, TTTLayer
from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.rotary import rotary_angles
from ttt.ops.rows import Tokens
from ttt.ops.triton.available import obstacle

PUBLISHED, COMPILED, PRODUCTS, ATTENTION = "published", "published, compiled", "products alone", "attention"
OURS = ("generic", "fused")
TRITON = "triton"
FLA = "fla chunk_ttt_linear"
NOTES = {
    COMPILED: "each mini-batch's step through torch.compile, as TTT-Video runs it",
    PRODUCTS: "no norm, no GELU, no bias, no autograd",
    ATTENTION: "scaled_dot_product_attention of the same width and heads",
    FLA: "another function than the published TTT-Linear: what a query has learned is scaled by the query's own rate",
}
"""What must be known beside a contender's numbers."""


@dataclass(frozen=True)
class Shape:
    """One problem."""

    name: str
    layer_type: Literal["linear", "mlp"]
    dim: int
    heads: int
    mini_batch_size: int
    tokens: int
    batch: int = 1
    causal: bool = True

    @property
    def head_width(self) -> int:
        """F."""
        return self.dim // self.heads

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the inner model."""
        return inner_widths(self.head_width, self.config(0))

    @property
    def minibatches(self) -> dict[int, int]:
        """How many there are of each size: full ones, and what is left."""
        steps, rest = divmod(self.tokens, self.mini_batch_size)
        return {size: count for size, count in ((self.mini_batch_size, steps), (rest, 1)) if size and count}

    def config(self, group_size: int | Literal["auto"]) -> TTTConfig:
        """TTT-LM's settings if it is causal, else TTT-Video's."""
        return TTTConfig.model_validate(
            {
                "preset": "lm" if self.causal else "video",
                "layer_type": self.layer_type,
                "mini_batch_size": self.mini_batch_size,
                "scan_checkpoint_group_size": group_size,
            }
        )

    def cost(self, group_size: int | Literal["auto"] = 0) -> ScanCost:
        """What `ttt check` says of it."""
        return scan_cost(
            self.config(group_size), dim=self.dim, num_heads=self.heads, tokens=self.tokens, batch_size=self.batch
        )

    def layer(self, group_size: int | Literal["auto"], device: torch.device) -> TTTLayer:
        """The layer, the same for every group size; weights that are not small, so that nothing is near zero."""
        layer = TTTLayer(self.dim, self.heads, self.config(group_size))
        generator = torch.Generator().manual_seed(0)
        layer.reset_parameters(generator)
        with torch.no_grad():
            for name in layer.weight_names:
                getattr(layer, name).normal_(0, 0.1, generator=generator)
        return layer.to(device)

    def inputs(self, device: torch.device) -> Tensor:
        """Tokens `[B,T,D]`."""
        x = torch.randn(self.batch, self.tokens, self.dim, generator=torch.Generator().manual_seed(1))
        return x.to(device).requires_grad_()

    def rotary(self, device: torch.device) -> Rotary | None:
        """The angles that a backbone gives a bidirectional layer."""
        if self.causal:
            return None
        positions = torch.arange(self.tokens, device=device)
        return rotary_angles(positions, self.head_width, theta=10000.0, dtype=torch.float32)


class Contender(NamedTuple):
    """Something to time."""

    name: str
    group_size: int | None
    """Mini-batches that backward recomputes at a time; None if it has no groups."""
    auto: bool
    """Whether the group size is the one of least memory."""
    forward: Callable[[], object]
    """Without gradients."""
    both: Callable[[], object]
    """Forward and backward."""
    kept: Callable[[], object] | None
    """Forward with gradients: its result keeps alive what backward needs."""


def _differentiable(
    name: str, function: Callable[[], Tensor], inputs: Sequence[Tensor], group: tuple[int | None, bool] = (None, False)
) -> Contender:
    with torch.no_grad():
        y = function()
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)

    def both() -> object:
        return torch.autograd.grad(function(), inputs, d_y)

    return Contender(name, *group, torch.no_grad()(function), both, function)


def _with(implementation: str, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with forced(implementation):
            return function()

    return run


Groups = Sequence[tuple[int, bool]]
"""Group sizes, and whether each is the automatic one."""


def ours_on(shape: Shape, device: torch.device) -> tuple[str, ...]:
    """Our implementations that are timed on a device: the Triton kernels on a GPU, where they have the shape."""
    if device.type == "cpu":  # at most interpreted, which says nothing about time
        return OURS
    why = obstacle(device_type=device.type, dtypes={torch.float32}, widths=shape.widths, size=shape.mini_batch_size)
    return OURS if why else (*OURS, TRITON)


def layer_contenders(
    shape: Shape, groups: Groups, device: torch.device, *, compiled: bool, names: Sequence[str] | None = None
) -> Iterator[Contender]:
    """Whole layers: projections, scan, norm, output.

    Args:
        shape: the problem.
        groups: group sizes.
        device: where.
        compiled: whether the published steps run through `torch.compile`, too.
        names: our implementations; by default those that are timed on the device.
    """
    if compiled:  # else what was compiled for other shapes counts towards the limit, and steps run as they are
        torch.compiler.reset()
    x, rotary = shape.inputs(device), shape.rotary(device)
    for group_size, auto in groups:
        layer = shape.layer(group_size, device)
        inputs, group = [x, *layer.parameters()], (group_size, auto)
        published = functools.partial(published_layer, layer, x, rotary=rotary, group_size=group_size)
        yield _differentiable(PUBLISHED, published, inputs, group)
        if compiled:
            yield _differentiable(COMPILED, functools.partial(published, compiled=True), inputs, group)
        for name in names or ours_on(shape, device):

            def ours(layer: TTTLayer = layer) -> Tensor:
                return layer(x, rotary=rotary)[0]

            yield _differentiable(name, _with(name, ours), inputs, group)
    layer = shape.layer(0, device)
    projections = [layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj]

    def attention() -> Tensor:
        q, k, v = (p(x).unflatten(-1, (shape.heads, -1)).transpose(1, 2) for p in projections[:3])
        z = F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)
        y: Tensor = projections[3](z.transpose(1, 2).flatten(2))
        return y

    yield _differentiable(ATTENTION, attention, [x, *(w for p in projections for w in p.parameters())])


def scan_contenders(
    shape: Shape, groups: Groups, device: torch.device, *, compiled: bool, names: Sequence[str] | None = None
) -> Iterator[Contender]:
    """The scan alone: from queries, keys, values and rates to answers; arguments as in `layer_contenders`."""
    if compiled:
        torch.compiler.reset()
    layer = shape.layer(0, device)
    with torch.no_grad():
        made = projected(layer, shape.inputs(device), 0, shape.rotary(device))
    q, k, v, rate = (x.contiguous().requires_grad_() for x in made)
    gamma, beta, scale = (x.detach().clone().requires_grad_() for x in (*norms(layer), step_sizes(layer)))
    opening = layer.initial_state(shape.batch).weights
    weights = tuple(w.detach().clone().contiguous().requires_grad_() for w in opening)
    inputs = [q, k, v, rate, gamma, beta, *([scale] if shape.causal else []), *weights]
    eps = layer.config.ln_eps
    inner = Inner(gamma, beta, scale, shape.causal, eps)
    for group_size, auto in groups:
        settings: dict[str, Any] = {"causal": shape.causal, "eps": eps, "group_size": group_size}

        def published(compiled: bool = False, settings: dict[str, Any] = settings) -> Tensor:
            return published_scan(weights, q, k, v, rate, gamma, beta, scale, **settings, compiled=compiled)[0]

        def ours(group_size: int = group_size) -> Tensor:
            return learn(Tokens(q, k, v - k, rate), Stream(weights), inner, group_size=group_size)[0]

        yield _differentiable(PUBLISHED, published, inputs, (group_size, auto))
        if compiled:
            yield _differentiable(COMPILED, functools.partial(published, True), inputs, (group_size, auto))
        for name in names or ours_on(shape, device):
            yield _differentiable(name, _with(name, ours), inputs, (group_size, auto))
    products = Products(shape.widths, shape.minibatches, shape.batch * shape.heads, q, dual=shape.causal)
    for group_size, auto in groups:
        recomputed = not shape.cost(group_size).keeps_everything
        both = functools.partial(products.forward_and_backward, recomputed=recomputed)
        yield Contender(PRODUCTS, group_size, auto, products.forward, both, None)
    attention = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=shape.causal)
    yield _differentiable(ATTENTION, attention, [q, k, v])
    if device.type == "cuda" and shape.layer_type == "linear" and shape.causal and importlib.util.find_spec("fla"):
        from fla.ops.ttt import chunk_ttt_linear

        def fla() -> Tensor:
            head_last = (x.transpose(1, 2) for x in (q, k, v))
            w, b = weights
            y: Tensor = chunk_ttt_linear(
                *head_last,
                *(gamma.squeeze(1), beta.squeeze(1), rate.transpose(1, 2)),
                eps=eps,
                chunk_size=shape.mini_batch_size,
                initial_state=w,
                initial_state_bias=b,
            )[0]
            return y

        yield _differentiable(FLA, fla, [q, k, v, rate, gamma, beta, *weights])
