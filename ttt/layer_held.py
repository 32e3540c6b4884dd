"""What reading a token needs of a layer's parameters: derived for each token, or kept by a layer held for inference."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ttt.config import TTTConfig
from ttt.layer_sharing import Projection, Sharing, held
from ttt.ops.constants import Precision
from ttt.ops.decode_rows import InnerRows
from ttt.ops.minibatch import Inner

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_READ = ("k_proj", "q_proj", "v_proj")
"""The projections of what a layer reads, in the order in which a held layer multiplies them as one."""
_OWN = (
    "ttt_norm_weight",
    "ttt_norm_bias",
    "learnable_ttt_lr_weight",
    "learnable_ttt_lr_bias",
)
"""The parameters beside those of its modules that `Parts` are made of; and `learnable_token_idx`, if it has one."""


class Layer(Protocol):
    """What of a `TTTLayer` reads one token."""

    config: TTTConfig
    head_width: int
    sharing: Sharing
    precision: Precision
    post_norm: nn.LayerNorm
    held: Held | None
    _modules: dict[str, nn.Module | None]
    _parameters: dict[str, nn.Parameter | None]

    @property
    def ttt_norm_weight(self) -> Tensor:
        """Of the inner model's norm, `[H,F]`."""
        ...

    @property
    def learnable_ttt_lr_weight(self) -> Tensor:
        """`[H,1,D]`."""
        ...

    @property
    def learnable_ttt_lr_bias(self) -> Tensor:
        """`[H,1]`."""
        ...

    @property
    def learnable_token_idx(self) -> Tensor:
        """Of step sizes, `[C]`; there if the config says so."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """A module of it by name."""
        ...

    def project(self, name: str, x: Tensor) -> Tensor:
        """One of the four projections of `[…,D]`."""
        ...

    def norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`γ` and `β` of the inner model's norm, `[H,1,F]`."""
        ...

    def scale(self, dtype: torch.dtype) -> Tensor:
        """The step size by position, `[C]`."""
        ...


class Linear(NamedTuple):
    """Of one product."""

    weight: Tensor
    bias: Tensor | None


class Parts(NamedTuple):
    """Parameters in the type and shape in which a token takes them."""

    inner: InnerRows
    gamma_H1F: Tensor
    """Of all heads of this process, for the target's norm."""
    beta_H1F: Tensor
    rates: Linear
    """`[H,D]` and `[H]`."""
    base_rate: Tensor
    """`base_lr / F`, `[1]`."""
    post_gamma_D: Tensor
    post_beta_D: Tensor
    read: Linear | None = None
    """`k`, `q` and `v` as one product, `[3D,D]`; None if each is projected by its module."""
    answer: Linear | None = None
    """`o`, as `read`."""


def parts_of(layer: Layer, dtype: torch.dtype, batch: int) -> Parts:
    """Derive them anew, for inner learning in a type and B streams."""
    config, gamma_beta = layer.config, layer.norm(dtype)
    gamma_H1F, beta_H1F = (layer.sharing.heads(x) for x in gamma_beta)
    inner = Inner(gamma_H1F, beta_H1F, _scale(layer, dtype), config.causal, config.ln_eps, layer.precision)
    weight, bias = held(layer.learnable_ttt_lr_weight).to(dtype), held(layer.learnable_ttt_lr_bias).to(dtype)
    norm = layer.post_norm
    return Parts(
        InnerRows(inner, batch),
        *gamma_beta,
        Linear(weight.squeeze(1), bias.squeeze(1)),
        _number(config.base_lr / layer.head_width, dtype, weight.device),
        held(norm.weight).to(dtype),
        held(norm.bias).to(dtype),
    )


def _scale(layer: Layer, dtype: torch.dtype) -> Tensor:
    """`TTTLayer.scale`, on the CPU from what depends on no parameter."""
    config = layer.config
    if not config.causal or layer.ttt_norm_weight.device.type != "cpu":
        return layer.scale(dtype)
    scale_C = _steps(config.mini_batch_size, dtype)
    if config.learnable_token_idx:
        scale_C = (scale_C + layer.sharing.entering(layer.learnable_token_idx).to(dtype)).clamp_min_(0)
    return scale_C


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _steps(size: int, dtype: torch.dtype) -> Tensor:
    """`1/i` for the positions i from 1, `[C]`, on the CPU; not to be written to."""
    return 1 / torch.arange(1, size + 1, dtype=dtype, device="cpu")


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as `[1]`; not to be written to."""
    return torch.full((1,), value, dtype=dtype, device=device)


class Held:
    """Of a layer held for inference: its `Parts`, made once.

    They are made again whenever one of the parameters lies elsewhere in memory or was written to since, as after `.to`,
    in a deep copy or when values are loaded, so that none is read that is out of date. (What writes through a tensor's
    `.data` cannot be told.) A layer whose projections are not its own modules alone, with a parameter that is computed
    from others, or that shares its heads with other processes keeps nothing, and is read as one that is not held.

    Args:
        dtype: of the tokens.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._forget()

    def _forget(self) -> None:
        self._parts: Parts | None = None
        self._batch = 0
        self._made_of: list[int] = []
        """The `_identities` of the layer's parameters when they were made."""
        self._memory: list[Tensor] = []
        """Of those parameters: as long as it is held, no other tensor can lie where one of them lay."""
        self._read: list[Tensor] = []
        """The weights of `_READ` as one, then its three parts."""

    def __reduce__(self) -> tuple[type[Held], tuple[torch.dtype]]:
        """Copies and pickles begin with nothing: their layers have parameters of their own."""
        return Held, (self.dtype,)

    def parts(self, layer: Layer, dtype: torch.dtype, batch: int) -> Parts | None:
        """Those for tokens of a type and B streams; None if the layer has to be read as one that is not held."""
        parameters = _parameters(layer)
        made_of = None if parameters is None else _identities(parameters)
        if parameters is None or made_of is None:
            self._forget()
            return None
        if dtype != self.dtype:
            if made_of != self._made_of:
                self._forget()  # rather than hold what may never be read again
            return None
        if made_of != self._made_of or batch != self._batch:
            self._make(layer, parameters, batch)
        return self._parts

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, layer: Layer, parameters: list[Tensor], batch: int) -> None:
        self._parts = None
        projections = [cast(Projection, layer.get_submodule(name)) for name in (*_READ, "o_proj")]
        weights: list[Tensor] = [projection.weight for projection in projections]
        biases: list[Tensor] = [projection.bias for projection in projections]
        if any(weight.dtype != self.dtype or weight.device != weights[0].device for weight in weights):
            self._forget()
        else:
            wide = torch.promote_types(self.dtype, torch.float32)
            read = Linear(self._joined(weights[:3]), None if biases[0] is None else torch.cat(biases[:3]))
            own = parts_of(layer, wide, batch)
            self._parts = own._replace(read=read, answer=Linear(weights[3].detach(), biases[3]))
        self._batch = batch
        self._made_of, self._memory = _identities(parameters) or [], [x.detach() for x in parameters]

    def _joined(self, weights: list[Tensor]) -> Tensor:
        """Weights `[D,D]` as one, of which they become parts, so that there is no second copy of them."""
        if [part.data_ptr() for part in self._read[1:]] != [weight.data_ptr() for weight in weights]:
            whole = torch.cat(weights)
            self._read = [whole, *whole.chunk(len(weights))]
            for weight, part in zip(weights, self._read[1:], strict=True):
                weight.data = part
        return self._read[0]


def _parameters(layer: Layer) -> list[Tensor] | None:
    """What `Parts` are made of; None if any of it is not a plain parameter in its place, but is computed, say.

    By a module's own tables, because `layer.name` takes a microsecond.
    """
    if not layer.sharing.alone:
        return None
    modules, own = layer._modules, layer._parameters
    found: list[Tensor | None] = []
    for name in PROJECTIONS:
        projection = modules[name]
        if type(projection) is not Projection or projection._forward_hooks or projection._forward_pre_hooks:
            return None
        found += projection._parameters.values()
    found = [x for x in found if x is not None]  # projections need no bias
    norm = layer.post_norm._parameters
    found += [norm.get("weight"), norm.get("bias"), *map(own.get, _OWN)]
    if layer.config.learnable_token_idx:
        found.append(own.get("learnable_token_idx"))
    plain: list[Tensor] = [x for x in found if type(x) is nn.Parameter]
    return plain if len(plain) == len(found) else None


def _identities(parameters: list[Tensor]) -> list[int] | None:
    """Where each lies in memory, and how often it was written to; None if one cannot tell."""
    try:
        return [number for x in parameters for number in (x.data_ptr(), x._version)]
    except RuntimeError:  # made in inference mode, a tensor does not count what is written to it
        return None
