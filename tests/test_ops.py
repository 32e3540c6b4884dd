"""The fast forms against the definition, in float64, with rates that vary and gradients of everything."""

from __future__ import annotations

import itertools

import pytest
import torch

from ttt.ops.minibatch import Inner, Stream, learn
from ttt.ops.mlp import gelu, gelu_gradient
from ttt.ops.norm import (
    inner_loss,
    inner_loss_gradient,
    layer_norm,
    normalize,
    normalize_target,
    outer_layer_norm,
    rms_norm,
)
from ttt.ops.reference import reference
from ttt.ops.rotary import apply_rotary, rotary_angles
from ttt.ops.rows import Tokens
from ttt.ops.tracing import trace_minibatches

C = 4
LENGTHS = [1, C - 1, C, C + 1, 3 * C + 2]
MODELS = {"linear": (), "mlp": (10,), "mlp of 3": (7, 5)}
B, H, F = 3, 2, 6


class Case:
    """Inputs of a sequence of T tokens; every tensor is a leaf that wants a gradient."""

    def __init__(self, length, hidden, *, causal=True, offset=True, open_state=False, seed=0):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0, shift=0.0):
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale + shift).requires_grad_()

        self.q, self.k, self.target = (draw(B, H, length, F) for _ in range(3))
        self.rate = (torch.rand(B, H, length, generator=g, dtype=torch.float64) * 0.5 + 0.05).requires_grad_()
        widths = (F, *hidden, F)
        self.weights, self.gradients = (), None
        for fan_in, fan_out in itertools.pairwise(widths):
            self.weights += (draw(B, H, fan_in, fan_out, scale=0.4), draw(B, H, 1, fan_out, scale=0.2))
        self.count = [0] * B
        if open_state:
            self.gradients = tuple(draw(*w.shape, scale=0.1) for w in self.weights)
            self.count = [1, C - 1, 2]
        self.gamma, self.beta = draw(H, F, scale=0.3, shift=1.0), draw(H, F, scale=0.3)
        self.offset = draw(C, scale=0.2) if offset and causal else None
        self.causal = causal
        self.eps = 1e-6

    @property
    def leaves(self):
        found = [self.q, self.k, self.target, self.rate, *self.weights, self.gamma, self.beta]
        return found + list(self.gradients or ()) + ([self.offset] if self.offset is not None else [])

    def inner(self):
        if self.causal:
            scale = 1 / torch.arange(1, C + 1, dtype=torch.float64)
            scale = (scale + self.offset).clamp_min(0) if self.offset is not None else scale
        else:
            scale = torch.full((C,), 1 / C, dtype=torch.float64)
        return Inner(self.gamma[:, None], self.beta[:, None], scale, self.causal, self.eps)

    def stream(self):
        if self.gradients is None:
            return Stream(self.weights)
        return Stream(self.weights, self.gradients, torch.tensor(self.count))

    def slow(self, mask=None):
        z, weights, gradients, count = reference(
            self.q, self.k, self.target, self.rate, self.weights, self.gamma, self.beta,
            mini_batch_size=C, causal=self.causal, eps=self.eps, offset_C=self.offset,
            gradients=self.gradients, count=self.count, mask=mask,
        )  # fmt: skip
        return [z, *weights, *gradients], count

    def fast(self, pieces=None, group_size=2, mask=None):
        tokens = Tokens(self.q, self.k, self.target, self.rate[..., None])
        parts, stream, start = [], self.stream(), 0
        for piece in pieces or [self.q.shape[2]]:
            part = Tokens(*(x[:, :, start : start + piece] for x in tokens))
            z, stream = learn(part, stream, self.inner(), group_size=group_size, mask_BT=mask)
            parts.append(z)
            start += piece
        gradients = stream.gradients or tuple(torch.zeros_like(w) for w in stream.weights)
        count = [0] * B if stream.count_B is None else stream.count_B.tolist()
        return [torch.cat(parts, dim=2), *stream.weights, *gradients], count


def gradients(outputs, leaves):
    """Of a sum that weighs every number differently."""
    total = sum((x * torch.linspace(0.3, 1.7, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def assert_equal_to(case, fast, slow):
    (outputs, count), (expected, expected_count) = fast, slow
    assert count == expected_count
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(outputs, case.leaves), gradients(expected, case.leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "non-causal"])
def test_dual_form_is_the_definition(model, length, causal):
    case = Case(length, MODELS[model], causal=causal, seed=length)
    assert_equal_to(case, case.fast(), case.slow())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_streams_that_stand_anywhere(model, length):
    """Open mini-batches at another place in every row, their summed gradients an input with a gradient."""
    case = Case(length, MODELS[model], open_state=True, seed=10 + length)
    assert_equal_to(case, case.fast(), case.slow())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("open_state", [False, True], ids=["from a boundary", "from anywhere"])
@pytest.mark.parametrize("pieces", [[1] * 14, [5, 1, 3, 5], [2, 12], [13, 1], [4, 4, 6]], ids=str)
def test_pieces_are_the_whole(model, open_state, pieces):
    """Law 4, outputs, final state and gradients through it."""
    case = Case(14, MODELS[model], open_state=open_state, seed=20)
    assert_equal_to(case, case.fast(pieces), case.fast())


@pytest.mark.parametrize("model", MODELS)
def test_pieces_of_whole_minibatches_are_the_whole_non_causal(model):
    case = Case(3 * C + 2, MODELS[model], causal=False, seed=21)
    assert_equal_to(case, case.fast([C, 2 * C, 2]), case.fast())


@pytest.mark.parametrize("group_size", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("open_state", [False, True])
def test_groups_change_nothing(group_size, open_state):
    """Law 2, at the level of the operation."""
    case = Case(18, (10,), open_state=open_state, seed=30)
    assert_equal_to(case, case.fast(group_size=group_size), case.fast(group_size=0))


@pytest.mark.parametrize("ops", ["fused", "generic", "reference"])
@pytest.mark.parametrize("length", [1, 3 * C + 2])
@pytest.mark.parametrize("kind", ["boundary", "anywhere", "non-causal"])
def test_a_mask_passes_tokens_over_whatever_they_hold(kind, length, ops, monkeypatch):
    """`learn` itself keeps NaN out: of answers and states, and of every gradient but for the zeros of such a token."""
    monkeypatch.setenv("TTT_OPS", ops)
    case = Case(length, (7,), causal=kind != "non-causal", open_state=kind == "anywhere", seed=60)
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0], mask[1, -1] = False, True
    expected, count = case.slow(mask.tolist())
    wanted = gradients(expected, case.leaves)
    with torch.no_grad():
        for tensor in (case.q, case.k, case.target, case.rate):
            tensor.masked_fill_(~mask[:, None].view(B, 1, length, *[1] * (tensor.dim() - 3)), torch.nan)
    outputs, found_count = case.fast(mask=mask)
    assert found_count == count
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not outputs[0][(~mask)[:, None].expand(B, H, length)].any()
    for a, b in zip(gradients(outputs, case.leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_token_of_zero_rate_teaches_nothing():
    """Law 8 for rates, and what padding relies on."""
    case = Case(6, (10,), seed=40)
    with torch.no_grad():
        case.rate[:, :, 2] = 0
        (before, *_), _ = case.fast()
        case.k[:, :, 2] += 1
        case.target[:, :, 2] -= 3
        (after, *_), _ = case.fast()
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_rows_do_not_see_each_other():
    """Law 5."""
    case = Case(9, (10,), open_state=True, seed=41)
    (z, *_), _ = case.fast()
    touched = torch.autograd.grad(z[1].sum(), case.leaves, allow_unused=True)
    for leaf, gradient in zip(case.leaves, touched, strict=True):
        if leaf.shape[0] == B and gradient is not None:
            assert gradient[0].abs().max() == 0
            assert gradient[2].abs().max() == 0


def test_causal_does_not_look_ahead_and_non_causal_does():
    """Law 3: the first output depends on later tokens only where the update is not causal."""
    for causal in (True, False):
        case = Case(C, (), causal=causal, seed=42)
        (z, *_), _ = case.fast()
        gradient = torch.autograd.grad(z[:, :, 0].square().sum(), case.target)[0]
        assert (gradient[:, :, 1:].abs().max() == 0) == causal


def test_non_causal_refuses_an_open_minibatch():
    case = Case(C, (), open_state=True)
    inner = case.inner()._replace(causal=False)
    tokens = Tokens(case.q, case.k, case.target, case.rate[..., None])
    with pytest.raises(ValueError, match="never left open"):
        learn(tokens, case.stream(), inner, group_size=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("causal", [True, False])
def test_trace_is_the_inner_loss_around_each_step(model, causal):
    case = Case(2 * C + 1, MODELS[model], causal=causal, offset=False, seed=50)
    inner = case.inner()
    found = trace_minibatches(Tokens(case.q, case.k, case.target, case.rate[..., None]), case.stream(), inner)
    assert found.before.shape == found.after.shape == (3,)

    def loss(weights, tokens):
        z = case.k[:, :, tokens]
        for i in range(0, len(weights), 2):
            z = z @ weights[i] + weights[i + 1]
            z = gelu(z) if i + 2 < len(weights) else z
        normed = layer_norm(z, case.gamma[:, None], case.beta[:, None], eps=case.eps)
        return (0.5 * (normed - case.target[:, :, tokens]).square().sum(-1)).mean()

    weights = case.weights
    for n, tokens in enumerate([slice(0, C), slice(C, 2 * C)]):
        part = Case(C, MODELS[model], causal=causal, offset=False, seed=50)
        part.q, part.k, part.target = (x[:, :, tokens] for x in (case.q, case.k, case.target))
        part.rate, part.weights = case.rate[:, :, tokens], weights
        part.gamma, part.beta = case.gamma, case.beta
        moved = part.slow()[0][1 : 1 + len(weights)]
        torch.testing.assert_close(found.before[n], loss(weights, tokens))
        torch.testing.assert_close(found.after[n], loss(moved, tokens))
        weights = tuple(moved)


def test_norm_gradient_against_autograd():
    g = torch.Generator().manual_seed(0)
    z, target = (torch.randn(5, 7, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gamma, beta = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    losses = inner_loss(z, target, gamma, beta, eps=1e-5)
    assert losses.shape == (5,)
    expected = torch.autograd.grad(losses.sum(), z)[0]
    torch.testing.assert_close(inner_loss_gradient(z, target, gamma, beta, eps=1e-5), expected, rtol=1e-12, atol=1e-12)
    own = torch.nn.functional.layer_norm(z, (7,), gamma, beta, eps=1e-5)
    torch.testing.assert_close(layer_norm(z, gamma, beta, eps=1e-5), own, rtol=1e-12, atol=1e-12)


def test_gelu_gradient_against_autograd():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(gelu(x).sum(), x)[0]
    torch.testing.assert_close(gelu_gradient(x), expected, rtol=1e-12, atol=1e-12)


def test_normalized_target_has_the_unbiased_deviation_with_eps_outside():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, generator=g, dtype=torch.float64)
    gamma, beta = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(2))
    expected = gamma * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3) + beta
    torch.testing.assert_close(normalize_target(x, gamma, beta, eps=1e-3), expected, rtol=1e-12, atol=1e-12)


# --- vectors without a direction ---


def numbers(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normalize_is_pytorchs_bit_for_bit(dtype):
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.logspace(-20, 4, 40, dtype=torch.float64)[:, None]
    x = torch.cat((x * sizes, torch.zeros(1, 7), torch.full((1, 7), torch.nan))).to(dtype).requires_grad_()
    expected = torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(normalize(x), expected, rtol=0, atol=0, equal_nan=True)
    long = x.detach().norm(dim=-1) >= 1e-12
    assert 5 < (~long).sum() < 20
    (found,), (theirs,) = (torch.autograd.grad((y * sizes[:7, 0]).sum(), x) for y in (normalize(x), expected))
    torch.testing.assert_close(found[long], theirs[long], rtol=0, atol=0)
    assert (found[:-1][~long[:-1]] == 0).all()
    assert found[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_normalize_of_zeros_is_zero_in_half_precision(dtype):
    x = numbers([0.0, 0.0], [3.0, 4.0], dtype=dtype)
    y = normalize(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), torch.tensor([[0.0, 0.0], [0.6, 0.8]], dtype=torch.float64), rtol=0, atol=3e-3
    )
    (found,) = torch.autograd.grad(y.sum(), x)
    assert found.isfinite().all()
    assert (found[0] == 0).all()


def test_second_derivatives_are_exact_and_at_zeros_zero():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(normalize, x)
    zeros = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(
        (normalize(zeros) * torch.arange(4.0)).sum() + zeros.sum() ** 2, zeros, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), zeros)
    assert (first == 0).all()
    assert (second == 8).all()  # of the square alone


NORMS = {
    "layer_norm": lambda x: layer_norm(x, torch.ones(4), torch.zeros(4), eps=1e-8),
    "outer_layer_norm": lambda x: outer_layer_norm(x, torch.ones(4).to(x), torch.zeros(4).to(x), eps=1e-6),
    "inner_loss_gradient": lambda x: inner_loss_gradient(x, torch.zeros(4), torch.ones(4), torch.zeros(4), eps=1e-8),
    "a lesson": lambda x: inner_loss_gradient(x, torch.arange(4.0), torch.ones(4), torch.zeros(4), eps=1e-8),
    "normalize_target": lambda x: normalize_target(x, torch.ones(4), torch.zeros(4), eps=1e-8),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_constant_vector_gets_no_gradient_and_the_others_theirs(name):
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7])
    one, other = [0.2, 0.1, -0.4, 0.3], [0.7, 0.7, 0.7, 0.7000001]
    for dtype in (torch.float32, torch.float64):
        x = numbers([0.0] * 4, [0.7] * 4, [-1e-30] * 4, one, other, dtype=dtype)
        y = NORMS[name](x)
        (found,) = torch.autograd.grad((y * weights).sum(), x)
        alone = numbers(one, dtype=dtype)
        (expected,) = torch.autograd.grad((NORMS[name](alone) * weights).sum(), alone)
        assert (found[:3] == 0).all()
        torch.testing.assert_close(found[3:4], expected)
        assert expected.abs().max() > 0
        # One last place of float32 is rounding there, and a direction in float64.
        assert bool((found[4] == 0).all()) == (dtype == torch.float32)


def test_what_a_constant_vector_teaches_and_its_share_of_the_target_stay_the_formulas():
    z, target, beta = (
        torch.zeros(1, 4, dtype=torch.float64, requires_grad=True),
        numbers([1.0, 2.0, 4.0, 0.0]),
        numbers([0.0] * 4),
    )
    gamma = torch.ones(4, dtype=torch.float64)
    lesson = inner_loss_gradient(z, target, gamma, beta, eps=1e-6)
    own = (target - target.mean()) * -1e3
    torch.testing.assert_close(lesson, own)
    weights = torch.arange(4, dtype=torch.float64)
    for found, expected in zip(
        torch.autograd.grad((lesson * weights).sum(), (target, beta)),
        torch.autograd.grad((own * weights).sum(), target) * 2,
        strict=True,
    ):
        torch.testing.assert_close(found.abs(), expected.abs())


def test_rms_norm_of_zeros_gets_no_gradient():
    x = numbers([0.0, 0.0], [0.7, 0.7])
    (found,) = torch.autograd.grad(rms_norm(x, eps=1e-6).sum(), x)
    assert (found[0] == 0).all()
    (expected,) = torch.autograd.grad((x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())[1].sum(), x)
    torch.testing.assert_close(found[1], expected[1])


def test_rotary_turns_adjacent_pairs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=g, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 7, 3])
    cos, sin = rotary_angles(positions, 8, theta=100.0, dtype=torch.float64)
    exponents = torch.arange(4, dtype=torch.float64) * 2 / 8
    turn = torch.polar(torch.ones(5, 4, dtype=torch.float64), positions[:, None] * 100.0**-exponents)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected, rtol=1e-12, atol=1e-12)
