"""A transformer over bytes, and where TTT goes in it: between a layer's attention and its feed-forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ttt import Site, TTTAdapter, TTTState
from ttt_example.options import ExampleOptions


class Memory:
    """What one layer remembers of streams that arrive in pieces."""

    keys_values: Tensor | None = None
    """Keys and values of all bytes so far, `[2, B, heads, T, head width]`."""
    ttt: TTTState | None = None
    """The TTT state after the last piece."""


# CHANGE 2: your layer's class, imported
class Layer(nn.Module):
    """Causal attention, then a feed-forward, each as a residual."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention_in, self.attention_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Transform tokens `[B,T,D]`; with a memory, they continue the streams in it."""
        x = self.after_attention(x + self.attend(self.norm1(x), memory), memory)
        return x + self.feed_forward(self.norm2(x))

    def attend(self, x: Tensor, memory: Memory | None) -> Tensor:
        """Causal attention: each token attends to itself and to earlier tokens; only the mask carries the order."""
        q, *keys_values = self.attention_in(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        known = torch.stack(keys_values)
        if memory is not None:
            known = known if memory.keys_values is None else torch.cat([memory.keys_values, known], 3)
            memory.keys_values = known
        earlier = known.shape[3] - q.shape[2]
        seen = torch.ones(q.shape[2], known.shape[3], dtype=torch.bool, device=x.device).tril(earlier)
        y = scaled_dot_product_attention(q, known[0], known[1], attn_mask=seen)
        return self.attention_out(y.transpose(1, 2).flatten(2))

    def after_attention(self, x: Tensor, memory: Memory | None) -> Tensor:
        """The place for TTT; without it, this returns x."""
        return x


# CHANGE 3: where TTT goes in your layer
class LayerWithTTT(Layer):
    """The class of a layer with TTT: its parameters keep their names, and the adapter is its child `ttt`."""

    ttt: TTTAdapter

    def after_attention(self, x: Tensor, memory: Memory | None) -> Tensor:
        """Apply TTT to the sequence, or to the next piece of each stream."""
        if memory is None:
            return self.ttt(x)
        x, memory.ttt = self.ttt.adapt(x, memory.ttt)
        return x


# CHANGE 2: your model's class, imported
class ByteTransformer(nn.Module):
    """Predicts the next byte: bytes `[B,T]` to logits `[B,T,256]`."""

    def __init__(self, options: ExampleOptions) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, options.dim)
        self.layers = nn.ModuleList(Layer(options.dim, options.num_heads) for _ in range(options.num_layers))
        self.head = nn.Sequential(nn.LayerNorm(options.dim), nn.Linear(options.dim, 256))

    def forward(self, tokens: Tensor, memories: Sequence[Memory] | None = None) -> Tensor:
        """Read whole sequences, or the next piece of streams with a memory for each layer."""
        x = self.embedding(tokens)
        for number, layer in enumerate(self.layers):
            x = layer(x, None if memories is None else memories[number])
        return self.head(x)


# CHANGE 2: your model made, and its weights loaded
def build(options: ExampleOptions) -> ByteTransformer:
    """Build a random model, the same for the same seed, without changing the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return ByteTransformer(options)


# CHANGE 3: where the layers are
def sites(model: nn.Module) -> list[Site]:
    """One site for each layer."""
    found = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, Layer)]
    return [
        Site(
            layer=number,
            path=path,
            module=layer,
            dim=layer.attention_out.in_features,
            num_heads=layer.num_heads,
            subclass=LayerWithTTT,
        )
        for number, (path, layer) in enumerate(found)
    ]


# CHANGE 4: your model fed piece by piece
def stream(model: nn.Module, tokens: Tensor, pieces: Sequence[int]) -> Tensor:
    """The logits of tokens that are fed in pieces of the given lengths."""
    memories = [Memory() for _ in sites(model)]
    return torch.cat([model(piece, memories) for piece in tokens.split(list(pieces), 1)], 1)
