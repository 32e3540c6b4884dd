"""Where an adapter of `memory_beyond_attention.py` starts: as a memory of which token followed which.

Drawn at random, an adapter would have to find out from next-token losses alone that a query of now and a key of then
have to meet, which takes far more tokens than there are here. Yet what such a memory needs stands in the hidden
states, and least squares find it without one step of descent: the *query* is a code of this token, the *key* a code of
the token before, the *value* a code of this token again. Then reading `a` answers with what came after the last `a`.
The code is the token's embedding, whitened over the tokens of the training documents, so that codes of two tokens are
nearly orthogonal. Then queries and keys learn for a few seconds, from the same hidden states and without the backbone,
to meet where a token was followed by the one that comes next (InfoNCE, arXiv 1807.03748). The output projection adds
the value's code to the residual stream where the model's head reads it.

The inner model starts from a constant answer, a random bias of unit variance. Without it, what the inner layer norm
makes of a query that nothing was written for would be as loud as what it makes of a known one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttt.adapter import TTTAdapter
from ttt.ops.norm import rms_norm

RIDGE = 30.0
TEMPERATURE = 0.08
FLOOR = 0.05
"""Least eigenvalue of the embeddings' covariance, as a share of their mean, when it is inverted."""


@dataclass
class Start:
    """What adapters at one site start from."""

    query: Tensor
    """`[D+1,D]`, from a normalised hidden state and a one to the code of its token."""
    key: Tensor
    """The same to the code of the token before."""
    value: Tensor
    """As `query`, before that is sharpened."""
    out: Tensor
    """`[D,D]`, from a code to the residual stream."""
    hidden: Tensor
    """Some hidden states of the site, `[N,D]`, to set scales by."""

    @torch.no_grad()
    def __call__(self, adapter: TTTAdapter, *, gain: float, key_norm: float = 4.0) -> None:
        """Set an adapter's parameters.

        Args:
            adapter: at this site, with biases (`qkvo_bias`) and without `normalize_qk`.
            gain: how loud the answer is at a gate of 0.1, as a multiple of a tenth of the hidden states.
            key_norm: mean norm of queries and keys in each head. A bias learns like a key of norm 1, so that with keys
                much longer than that the memory is of tokens, not of the last few answers.
        """
        layer = adapter.layer
        wide = with_one(rms_norm(self.hidden, eps=layer.config.ln_eps))
        loud = 8 * math.sqrt(layer.head_width)  # `k` is then small beside `v` in the target `v − k`
        for projection, found, norm in (
            (layer.q_proj, self.query, key_norm),
            (layer.k_proj, self.key, key_norm),
            (layer.v_proj, self.value, loud),
        ):
            heads = (wide @ found).unflatten(-1, (layer.num_heads, layer.head_width))
            scaled = found * (norm / heads.norm(dim=-1).mean())
            _set(projection, scaled[:-1].T, scaled[-1])
        self._inner_model(adapter, key_norm)
        out = self.out * (gain * self.hidden.square().mean().sqrt() / self.out.square().sum(-1).mean().sqrt())
        last_bias = getattr(layer, layer.weight_names[-1])
        _set(layer.o_proj, out, -(out @ last_bias.flatten()))
        layer.learnable_ttt_lr_weight.mul_(0.05)

    def _inner_model(self, adapter: TTTAdapter, key_norm: float) -> None:
        """Answer a constant to everything; the hidden layers of an MLP are random features of the key."""
        layer = adapter.layer
        *hidden, last, bias = (getattr(layer, name) for name in layer.weight_names)
        for weight in hidden[::2]:
            weight.mul_(1 / (key_norm * weight.std()))
        last.zero_()
        drawn = layer.q_proj.weight.new_empty(bias.shape).copy_(_noise(bias))
        bias.copy_((drawn - drawn.mean(-1, keepdim=True)) / drawn.std(-1, keepdim=True))


def _noise(like: Tensor) -> Tensor:
    """Noise that depends on the global seed and is the same on every device."""
    return torch.randn(like.shape)


def _set(projection: nn.Module, weight: Tensor, bias: Tensor) -> None:
    for parameter, value in ((projection.weight, weight), (projection.bias, bias)):
        assert isinstance(parameter, nn.Parameter)
        parameter.copy_(value)


def with_one(x: Tensor) -> Tensor:
    """`x [N,D]` and a column of ones."""
    return torch.cat([x, torch.ones_like(x[:, :1])], -1)


def codes(embedding: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of all tokens `[V,D]`: embeddings, whitened over the tokens of documents; and the matrix that whitens."""
    read = embedding[tokens.flatten()]
    centred = read - read.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    whitening = vectors @ torch.diag((values + FLOOR * values.mean()).rsqrt()) @ vectors.T
    return (embedding - read.mean(0)) @ whitening, whitening


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """`[D+1,E]`, the ridge regression from `x [N,D]` and a one to `y [N,E]`."""
    wide = with_one(x)
    gram = wide.T @ wide + RIDGE * torch.eye(wide.shape[1], device=x.device)
    return torch.linalg.solve(gram, wide.T @ y)


def sharpened(start: Start, hidden_NTD: Tensor, tokens_NT: Tensor, *, window: int, steps: int, eps: float) -> Start:
    """Queries and keys that meet more often where they should.

    Position t is to find those earlier s whose token comes next after t: the loss is `−log Σ_s p(s|t)` over them, with
    `p` the softmax of cosines of query and key at temperature 0.08, over positions with any, beyond the window.
    """
    wide = with_one(rms_norm(hidden_NTD, eps=eps).flatten(0, 1)).unflatten(0, hidden_NTD.shape[:2])
    maps = [nn.Parameter(one / (wide[:4] @ one).norm(dim=-1).mean()) for one in (start.query, start.key)]
    optimiser = torch.optim.AdamW(maps, lr=5e-5, weight_decay=0.01, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(0)
    length = tokens_NT.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=tokens_NT.device).tril()
    for step in range(steps):
        rows = torch.randint(0, len(wide), (3,), generator=draw)
        following = torch.roll(tokens_NT[rows], -1, 1)
        right = (tokens_NT[rows][:, None] == following[..., None]) & earlier
        right[:, -1] = False  # nothing follows
        query, key = (nn.functional.normalize(wide[rows] @ one, dim=-1) for one in maps)
        scores = (query @ key.mT / TEMPERATURE).masked_fill(~earlier, -1e9)
        found = scores.masked_fill(~right, -1e9).logsumexp(-1) - scores.logsumexp(-1)
        known = right.any(-1)
        known[:, :window] = False
        loss = -found[known].mean() if known.any() else 0 * scores.sum()
        for group in optimiser.param_groups:
            group["lr"] = 5e-5 * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    query, key = (_centred(one.detach(), wide[:8].flatten(0, 1)) for one in maps)
    return dataclasses.replace(start, query=query, key=key, value=start.value)


def _centred(matrix: Tensor, wide: Tensor) -> Tensor:
    """The map, so that its answers have no mean: attention is blind to a mean of keys, a linear memory is not."""
    shifted = matrix.clone()
    shifted[-1] -= (wide @ matrix).mean(0)
    return shifted


@torch.no_grad()
def find_start(
    hidden_NTD: Tensor, tokens_NT: Tensor, embedding: Tensor, head: Callable[[Tensor], Tensor] | None, *, eps: float
) -> Start:
    """Fit the codes of this token and of the one before to the hidden states of a site, over training documents.

    Args:
        hidden_NTD: hidden states.
        tokens_NT: their tokens.
        embedding: `[V,D]`, tied with the model's head.
        head: how a code's whitening `[D,D]` becomes the map to the residual stream if the site is after the last
            layer, whose answer the final norm reads; None for the layers below, in whose stream embeddings are plain.
        eps: of the norm of the layer's input.
    """
    code, whitening = codes(embedding, tokens_NT)
    x, of = rms_norm(hidden_NTD, eps=eps), code[tokens_NT]
    width = x.shape[-1]
    query = least_squares(x.reshape(-1, width), of.reshape(-1, width))
    key = least_squares(x[:, 1:].reshape(-1, width), of[:, :-1].reshape(-1, width))
    out = torch.linalg.inv(whitening) if head is None else head(whitening)
    return Start(query, key, query, out, hidden_NTD[:8].reshape(-1, width))
