"""The inner loss of each token at W₀, W_{t−1} and W_t, against weights that are written out for every token."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.config import TTTConfig
from ttt.layer import TTTLayer
from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.rows import Tokens
from ttt.ops.tracing import InnerTrace, trace, trace_minibatches

MODELS = {"linear": (), "mlp": (9,)}
SIZES = [1, 4, 16]
LENGTHS = [1, 19]
PIECES = {"single tokens": 1, "threes": 3, "sevens": 7, "whole": 1000}
B, H, WIDTH = 3, 2, 6
EPS = 1e-6

Losses = tuple[Tensor, Tensor, Tensor]
Tracer = Callable[[Tokens, Stream, Inner, tuple[Tensor, ...]], InnerTrace]


class Case:
    """B streams of T tokens in float64, of values and rates that vary, and the state from which they start.

    With `open_state`, each row has read another number of tokens of its mini-batch.
    """

    def __init__(
        self, length: int, hidden: tuple[int, ...], size: int, *, causal: bool = True, open_state: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(100 * length + size)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        q, k, target = (draw(B, H, length, WIDTH) for _ in range(3))
        rate = torch.rand(B, H, length, 1, generator=g, dtype=torch.float64) * 0.5 + 0.05
        rate[1, :, length // 2] = 0  # a token that teaches nothing
        self.tokens = Tokens(q, k, target, rate)
        self.weights: tuple[Tensor, ...] = ()
        for fan_in, fan_out in itertools.pairwise((WIDTH, *hidden, WIDTH)):
            self.weights += (draw(B, H, fan_in, fan_out, scale=0.4), draw(B, H, 1, fan_out, scale=0.2))
        self.stream = Stream(self.weights)
        if open_state:
            count = torch.tensor([0, 1, size - 1]) % size
            gradients = tuple(draw(*w.shape, scale=0.3) * (count > 0)[:, None, None, None] for w in self.weights)
            self.stream = Stream(self.weights, gradients, count)
        scale = torch.full((size,), 1 / size, dtype=torch.float64)
        if causal:  # learned offsets, and one that is cut off at zero
            scale = (1 / torch.arange(1, size + 1, dtype=torch.float64) + draw(size, scale=0.2)).clamp_min(0)
            scale[size // 2] = 0 if size > 1 else 0.9
        norms = 1 + draw(H, 1, WIDTH, scale=0.3), draw(H, 1, WIDTH, scale=0.3)
        self.inner = Inner(*norms, scale, causal, EPS)

    @property
    def start(self) -> tuple[Tensor, ...]:
        """`W₀`: what each row would answer with before it reads its first token."""
        return tuple(torch.stack([self.opened(row)[0][n][row] for row in range(B)]) for n in range(len(self.weights)))

    def opened(self, row: int) -> tuple[list[Tensor], list[Tensor], int]:
        """The weights of a row before its first token, its summed gradients and their count."""
        if self.stream.gradients is None or self.stream.count_B is None:
            return list(self.weights), [torch.zeros_like(w) for w in self.weights], 0
        count = int(self.stream.count_B[row])
        step = self.inner.scale_C[count - 1] if count else 0
        gradients = list(self.stream.gradients)
        return [w - step * g for w, g in zip(self.weights, gradients, strict=True)], gradients, count

    def loss(self, weights: list[Tensor], row: int, t: int) -> Tensor:
        """`ℓ(W; x_t)` of one row, `[H]`, for weights `[H,in,out]`."""
        x = self.tokens.k[row, :, t]
        for n in range(0, len(weights), 2):
            x = torch.einsum("hi,hio->ho", x, weights[n]) + weights[n + 1][:, 0]
            x = F.gelu(x, approximate="tanh") if n + 2 < len(weights) else x
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        gamma, beta = self.inner.gamma_H1F[:, 0], self.inner.beta_H1F[:, 0]
        return 0.5 * (gamma * normed + beta - self.tokens.target[row, :, t]).square().sum(-1)

    def lesson(self, weights: list[Tensor], row: int, t: int) -> list[Tensor]:
        """`η_t ∇ℓ_t(W)` of one row."""
        probes = [w.clone().requires_grad_() for w in weights]
        found = torch.autograd.grad(self.loss(probes, row, t).sum(), probes)
        return [self.tokens.rate[row, :, t, :, None] * gradient for gradient in found]

    def definition(self) -> Losses:
        """The three losses, `[B,T]` each, from weights that are written out for every token."""
        rows = [self._row(row) for row in range(B)]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]

    def _row(self, row: int) -> Losses:
        length, scale, size = self.tokens.k.shape[2], self.inner.scale_C, self.inner.mini_batch_size
        own, summed, i = ([x[row] for x in part] if isinstance(part, list) else part for part in self.opened(row))
        first, opening = own, [w[row] for w in self.weights]
        at: list[tuple[list[Tensor], list[Tensor]]] = []  # W_{t−1} and W_t of each token
        for t in range(length):
            summed = [s + g for s, g in zip(summed, self.lesson(opening, row, t), strict=True)]
            i += 1
            before, own = own, [w - scale[i - 1] * s for w, s in zip(opening, summed, strict=True)]
            at.append((before, own))
            if i == size or (not self.inner.causal and t == length - 1):
                if not self.inner.causal:  # all tokens of the mini-batch were answered by its end, and met its opening
                    at[-i:] = [(opening, own)] * i
                opening, summed, i = own, [torch.zeros_like(s) for s in summed], 0
        losses = [[self.loss(w, row, t).mean() for w in (first, *pair)] for t, pair in enumerate(at)]
        return tuple(map(torch.stack, zip(*losses, strict=True)))  # type: ignore[return-value]

    def traced(self, tracer: Tracer, piece: int) -> Losses:
        """What a tracer gives for the sequence in pieces, joined."""
        parts, stream = [], self.stream
        for first in range(0, self.tokens.k.shape[2], piece):
            tokens = self.tokens.map(lambda x, first=first: x[:, :, first : first + piece])  # type: ignore[misc]
            parts.append(tracer(tokens, stream, self.inner, self.start))
            _, stream = learn(tokens, stream, self.inner, group_size=0)
        return tuple(torch.cat(losses, dim=1) for losses in zip(*parts, strict=True))  # type: ignore[return-value]


def ours(tokens: Tokens, stream: Stream, inner: Inner, start: tuple[Tensor, ...]) -> InnerTrace:
    return trace(tokens, stream, inner, start=start)


def close(found: Losses, expected: Losses) -> bool:
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("size", "ops"), [*((size, "") for size in SIZES), (4, "generic"), (4, "fused"), (4, "reference")]
)
@pytest.mark.parametrize("open_state", [False, True], ids=["from a boundary", "from anywhere"])
@pytest.mark.parametrize("model", MODELS)
def test_each_token_at_its_own_weights_in_pieces_of_any_length(
    model: str, size: int, open_state: bool, ops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTT_OPS", ops)
    for length in LENGTHS if not ops else [6]:
        case = Case(length, MODELS[model], size, open_state=open_state)
        expected = case.definition()
        assert all(losses.shape == (B, length) for losses in expected)
        for name, piece in PIECES.items():
            assert close(case.traced(ours, piece), expected), (length, name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_a_mini_batch_that_learns_as_one_lies_between_its_opening_and_its_end(model: str, size: int) -> None:
    for length in LENGTHS:
        case = Case(length, MODELS[model], size, causal=False)
        expected = case.definition()
        for piece in (size, 3 * size, 1000):
            assert close(case.traced(ours, piece), expected), (length, piece)


def test_the_curves_part_once_something_is_learned() -> None:
    w0, before, after = Case(23, (9,), 4).traced(ours, 7)
    torch.testing.assert_close(w0[:, 0], before[:, 0], rtol=1e-12, atol=1e-12)
    assert (w0[:, 5:] - before[:, 5:]).abs().min() > 1e-6
    assert (before - after)[:, ::4].abs().min() > 1e-6


def carried_as_the_start(tokens: Tokens, stream: Stream, inner: Inner, start: tuple[Tensor, ...]) -> InnerTrace:
    return trace(tokens, stream, inner, start=stream.weights)


def mini_batches_as_positions(tokens: Tokens, stream: Stream, inner: Inner, start: tuple[Tensor, ...]) -> InnerTrace:
    steps = trace_minibatches(tokens, stream, inner)
    length = tokens.k.shape[2]
    before, after = (x.repeat_interleave(inner.mini_batch_size)[:length].expand(B, -1) for x in steps)
    return trace(tokens, stream, inner, start=start)._replace(before=before, after=after)


def the_open_mini_batch_anew(tokens: Tokens, stream: Stream, inner: Inner, start: tuple[Tensor, ...]) -> InnerTrace:
    return trace(tokens, Stream(stream.weights), inner, start=start)


def the_opening_as_before(tokens: Tokens, stream: Stream, inner: Inner, start: tuple[Tensor, ...]) -> InnerTrace:
    found = trace(tokens, stream, inner, start=start)
    shut = trace(tokens.map(lambda x: x[:, :, :1]), Stream(stream.weights), inner, start=start)
    return found._replace(before=torch.cat((shut.before, found.before[:, 1:]), dim=1))


SABOTEURS: dict[str, tuple[Tracer, set[int]]] = {
    "the carried weights as W₀": (carried_as_the_start, {0}),
    "mini-batches as positions": (mini_batches_as_positions, {1, 2}),
    "the open mini-batch anew": (the_open_mini_batch_anew, {1, 2}),
    "the opening as W_{t−1}": (the_opening_as_before, {1}),
}


@pytest.mark.parametrize("name", SABOTEURS)
@pytest.mark.parametrize("model", MODELS)
def test_what_the_published_attempt_did_is_told_apart(name: str, model: str) -> None:
    saboteur, wrong = SABOTEURS[name]
    case = Case(23, MODELS[model], 4)
    expected, found = case.definition(), case.traced(saboteur, 3)
    told = {n for n in range(3) if (found[n] - expected[n]).abs().max() > 1e-2}
    assert told == wrong


# --- the layer ---


def layer(**settings: object) -> TTTLayer:
    made = TTTLayer(12, 2, TTTConfig.model_validate({"rope": "mini_batch", **settings}), dtype=torch.float64)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(torch.randn(value.shape, generator=g, dtype=torch.float64) * 0.2)
    return made


def read(layer: TTTLayer, x: Tensor, piece: int, state: object = None) -> Losses:
    """The layer's trace of tokens in pieces, joined; the state goes from one to the next, W₀ stays."""
    start, parts = state, []
    for part in x.split(piece, dim=1):
        parts.append(layer.trace(part, state, start=start))  # type: ignore[arg-type]
        with torch.no_grad():
            _, state = layer(part, state)
    return tuple(torch.cat(losses, dim=1) for losses in zip(*parts, strict=True))  # type: ignore[return-value]


def sequence(seed: int, length: int = 23) -> Tensor:
    return torch.randn(B, length, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
def test_a_layers_losses_are_those_of_the_weights_that_answer(layer_type: str, size: int, learned: bool) -> None:
    made = layer(layer_type=layer_type, mini_batch_size=size, learnable_token_idx=learned)
    x, (_, carried) = sequence(1, 11), made(sequence(2, 6))
    found = read(made, x, 11, carried)
    state, written = carried, []
    for t in range(x.shape[1]):
        token = x[:, t : t + 1]
        weights = [made.effective_weights(carried), made.effective_weights(state)]
        opened = state
        with torch.no_grad():
            _, state = made(token, state)
        weights.append(made.effective_weights(state))
        inputs = made._tokens(token, opened, None)
        written.append([trace(inputs, Stream(w), made._inner(x.dtype), start=w).w0[:, 0] for w in weights])
    for losses, expected in zip(found, zip(*written, strict=True), strict=True):
        torch.testing.assert_close(losses, torch.stack(expected, dim=1), rtol=1e-9, atol=1e-9)
    for piece in (1, 3, 7):
        assert close(read(made, x, piece, carried), found)


def test_a_skipped_token_has_no_loss_and_the_others_theirs() -> None:
    made = layer(mini_batch_size=4, skip_nonfinite_tokens=True)
    x = sequence(4)
    x[1, 6], x[2, 0, 3], x[0, 22] = torch.nan, torch.inf, -torch.inf
    whole = read(made, x, 23)
    for losses in whole:
        assert losses.isnan().nonzero().tolist() == [[0, 22], [1, 6], [2, 0]]
    for piece in (1, 3, 7):
        for a, b in zip(read(made, x, piece), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_without_a_start_the_layers_own_weights_are_meant() -> None:
    made = layer(mini_batch_size=4)
    x = sequence(5)
    with torch.no_grad():
        _, later = made(sequence(6, 24))  # at a boundary, where positions begin again
    own = made.trace(x)
    torch.testing.assert_close(made.trace(x, later).w0, own.w0)
    assert (made.trace(x, later, start=later).w0 - own.w0).abs().min() > 1e-9
    with pytest.raises(ValueError, match="the state is of 1 streams"):
        made.trace(x, start=made.initial_state(1, dtype=torch.float64))


def test_tokens_in_bfloat16_are_measured_in_float32() -> None:
    made = layer(mini_batch_size=4).to(torch.bfloat16)
    found = made.trace(sequence(7).bfloat16())
    assert {losses.dtype for losses in found} == {torch.float32}
    assert all(losses.isfinite().all() for losses in found)
