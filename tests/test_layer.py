"""The layer's options against the reference, its types, and its state as a thing of its own."""

from __future__ import annotations

import pytest
import torch
import zero_tokens
from torch import nn
from torch.nn import functional as F

from ttt.adapter import Gate, TTTAdapter, gates_closed
from ttt.config import TTTConfig
from ttt.config.schema import inner_widths
from ttt.errors import EnvironmentProblem
from ttt.layer import TTTLayer
from ttt.ops.norm import normalize_target
from ttt.ops.reference import reference
from ttt.ops.rotary import apply_rotary
from ttt.state import TTTState

D, H, T, B, C = 12, 3, 11, 2, 4
WIDTH = D // H


def make(seed=0, dtype=torch.float64, **settings):
    settings = {"mini_batch_size": C, **settings}
    layer = TTTLayer(D, H, TTTConfig.model_validate(settings), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():  # every parameter acts, those that start at zero too
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return layer


def tokens(seed=1, length=T, dtype=torch.float64):
    return torch.randn(B, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(length=T):
    return torch.rand(length, WIDTH // 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 4


def directed(x):
    """`x`, whose vectors of one value get no gradient, and which those are."""
    constant = (x == x[..., :1]).all(-1, keepdim=True)
    return torch.where(constant, x.detach(), x), constant


def by_the_design(layer, x, rotary=None):
    """Section 3 of the design with `ttt.ops.reference` for the inner learning; shares no code with the layer."""
    c = layer.config
    if c.input_norm == "rms":
        x = directed(x)[0]
        x = x / (x.pow(2).mean(-1, keepdim=True) + c.ln_eps).sqrt()

    def heads(linear):
        y = x @ linear.weight.T + (linear.bias if c.qkvo_bias else 0)
        return y.view(B, -1, H, WIDTH).transpose(1, 2)

    q, k, v = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
    if c.normalize_qk:
        q, k = (
            torch.where(none, 0, y / torch.where(none, 1, y).norm(dim=-1, keepdim=True))
            for y, none in map(directed, (q, k))
        )
    if c.rope == "mini_batch":
        position = torch.arange(x.shape[1], dtype=torch.float64) % C
        angle = position[:, None] * c.rope_theta ** (-2 * torch.arange(WIDTH // 2, dtype=torch.float64) / WIDTH)
        rotary = angle.cos(), angle.sin()
    if rotary is not None:
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    target = v - k
    gamma, beta = layer.ttt_norm_weight, layer.ttt_norm_bias
    if c.normalize_target:
        target, none = directed(target)
        deviation = torch.where(none, 0, torch.where(none, torch.arange(WIDTH) * 1.0, target).std(-1, keepdim=True))
        target = gamma[:, None] * (target - target.mean(-1, keepdim=True)) / (deviation + c.target_eps) + beta[:, None]
    rate = torch.stack(
        [
            c.base_lr * torch.sigmoid(x @ layer.learnable_ttt_lr_weight[h, 0] + layer.learnable_ttt_lr_bias[h]) / WIDTH
            for h in range(H)
        ],
        dim=1,
    )
    weights = tuple(getattr(layer, name).expand(B, *getattr(layer, name).shape) for name in layer.weight_names)
    z, *_ = reference(
        q, k, target, rate, weights, gamma, beta, mini_batch_size=C, causal=c.causal, eps=c.ln_eps,
        offset_C=layer.learnable_token_idx if c.learnable_token_idx else None,
    )  # fmt: skip
    z, _ = directed(z.transpose(1, 2).reshape(x.shape))
    z = F.layer_norm(z, (D,), layer.post_norm.weight, layer.post_norm.bias, 1e-6)
    return z @ layer.o_proj.weight.T + (layer.o_proj.bias if c.qkvo_bias else 0)


OPTIONS = [
    {},
    {"layer_type": "mlp", "mlp_expansion_factor": 2.0},
    {"layer_type": "mlp", "mlp_layers": 3, "mlp_hidden_dims": [6, 5]},
    {"preset": "video", "layer_type": "mlp"},
    {"preset": "video"},
    {"rope": "none", "learnable_token_idx": False},
    {"rope": "backbone", "base_lr": 0.3},
    {"qkvo_bias": True, "normalize_qk": True, "normalize_target": True, "input_norm": "rms", "rope_theta": 50.0},
    {"layer_type": "mlp", "qkvo_bias": True, "normalize_target": True, "ln_eps": 1e-3, "input_norm": "rms"},
    {"qkvo_bias": True, "normalize_target": True, "target_eps": 0.3},
]


def assert_as_the_design(layer, x, *, tolerance):
    """Outputs and the gradient of every parameter and of the tokens."""
    rotary = (angles().cos(), angles().sin()) if layer.config.rope == "backbone" else None
    weights = torch.linspace(0.5, 1.5, B * T * D, dtype=torch.float64).view(B, T, D)
    leaves = [x, *layer.parameters()]
    results = []
    for y in (layer(x, rotary=rotary)[0], by_the_design(layer, x, rotary)):
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaves)])
    names = ["output", "x", *(name for name, _ in layer.named_parameters())]
    for name, a, b in zip(names, *results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_every_option_is_as_the_design_defines_it(settings):
    layer = make(**settings)
    x = tokens().requires_grad_()
    assert_as_the_design(layer, x, tolerance=1e-10)


MOSHI = {
    **{"qkvo_bias": True, "normalize_qk": True, "normalize_target": True},
    **{"learnable_token_idx": False, "input_norm": "rms"},
}


@pytest.mark.parametrize("ops", ["generic", "fused"])
@pytest.mark.parametrize(
    "settings", [{}, {"preset": "video", "layer_type": "mlp"}, {"layer_type": "mlp", **MOSHI}], ids=str
)
def test_zero_tokens_at_the_start_are_as_the_design_defines_them(settings, ops, monkeypatch):
    """Biases zero: nowhere has such a token a direction."""
    layer = TTTLayer(D, H, TTTConfig.model_validate({"mini_batch_size": C, **settings}), dtype=torch.float64)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    x = tokens()
    x[0, :6] = x[1, 3:5] = 0
    x.requires_grad_()
    monkeypatch.setenv("TTT_OPS", ops)
    assert_as_the_design(layer, x, tolerance=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("preset", zero_tokens.PRESETS)
@pytest.mark.parametrize("stretch", ["text", "all"])
def test_a_stretch_of_zero_tokens_leaves_the_gradient_of_a_fresh_layer_as_it_is(preset, stretch, dtype, monkeypatch):
    """`benchmarks/zero_tokens.py` has the table of all of them; with the formulas' derivatives these were infinite."""
    monkeypatch.setattr(zero_tokens, "DIM", 16)
    settings = {"layer_type": "mlp", **zero_tokens.PRESETS[preset]}
    zeros = zero_tokens.STRETCHES[stretch]
    found = zero_tokens.gradient_norm(settings, dtype, zeros, cut=False)
    assert 0 < found < 100
    if stretch != "all":
        assert found == pytest.approx(zero_tokens.gradient_norm(settings, dtype, zeros, cut=True), rel=0.1)


@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
def test_parameters_have_the_names_and_shapes_of_the_literature(layer_type):
    layer = TTTLayer(D, H, TTTConfig(layer_type=layer_type, preset="video"))
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    hidden = WIDTH if layer_type == "linear" else 4 * WIDTH
    expected = {
        **{f"{name}_proj.weight": (D, D) for name in "qkvo"},
        **{f"{name}_proj.bias": (D,) for name in "qkvo"},
        "W1": (H, WIDTH, hidden),
        "b1": (H, 1, hidden),
        "ttt_norm_weight": (H, WIDTH),
        "ttt_norm_bias": (H, WIDTH),
        "learnable_ttt_lr_weight": (H, 1, D),
        "learnable_ttt_lr_bias": (H, 1),
        "post_norm.weight": (D,),
        "post_norm.bias": (D,),
    }
    if layer_type == "mlp":
        expected |= {"W2": (H, hidden, WIDTH), "b2": (H, 1, WIDTH)}
    assert shapes == expected
    learned = TTTLayer(D, H, TTTConfig(mini_batch_size=7))
    assert learned.learnable_token_idx.shape == (7,)


def test_values_start_as_the_design_says():
    layer = TTTLayer(128, 4, TTTConfig(layer_type="mlp", qkvo_bias=True))
    for name, parameter in layer.named_parameters():
        if "norm_weight" in name or name == "post_norm.weight":
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or name.startswith("b") or name == "learnable_token_idx":
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std().item() - 0.02) < 0.002, name
    assert (Gate(8, 0.1).gating_alpha == 0.1).all()


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        ({"layer_type": "linear"}, (8, 8)),
        ({"layer_type": "mlp"}, (8, 32, 8)),
        ({"layer_type": "mlp", "mlp_layers": 4, "mlp_expansion_factor": 1.5}, (8, 12, 12, 12, 8)),
        ({"layer_type": "mlp", "mlp_layers": 3, "mlp_hidden_dims": [5, 9]}, (8, 5, 9, 8)),
    ],
    ids=str,
)
def test_widths_of_the_inner_model(settings, widths):
    assert inner_widths(8, TTTConfig.model_validate(settings)) == widths


def test_fast_weights_stay_float32_in_bfloat16():
    """The projections run in bfloat16; what is learned there would be rounded away in it."""
    x = tokens(length=40)
    layer = make(dtype=torch.float32, layer_type="mlp", qkvo_bias=True, normalize_qk=True, base_lr=0.1)
    expected, end = layer(x.float())
    y, state = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for weight in state.weights)
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    # A whole layer cast to bfloat16 keeps its fast weights in float32 as well.
    _, cast = layer.bfloat16()(x.bfloat16())
    assert all(weight.dtype == torch.float32 for weight in cast.weights)
    moved = [(a - b).abs().max() for a, b in zip(state.weights, end.weights, strict=True)]
    assert max(moved) < 0.05


@pytest.mark.parametrize("group_size", [0, 2, 3])
def test_autocast_reaches_the_projections_only(group_size):
    x = tokens(length=18).float()
    layer = make(dtype=torch.float32, layer_type="mlp", base_lr=0.1, scan_checkpoint_group_size=group_size)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        y.float().square().mean().backward()
    assert all(weight.dtype == torch.float32 for weight in state.weights)
    found = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    expected, _ = layer(x)
    expected.square().mean().backward()
    assert (y.float() - expected).norm() < 0.03 * expected.norm()
    for name, parameter in layer.named_parameters():
        assert (found[name] - parameter.grad).norm() < 0.1 * parameter.grad.norm(), name


def test_state_round_trips(tmp_path):
    layer = make()
    _, state = layer(tokens(length=6))
    assert state.count.tolist() == [2, 2]
    path = tmp_path / "state.safetensors"
    state.detach().save(path)
    loaded = TTTState.load(path)
    assert loaded.tensors().keys() == state.tensors().keys()
    x = tokens(seed=9)
    torch.testing.assert_close(layer(x, loaded)[0], layer(x, state)[0], rtol=0, atol=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_file_that_is_no_state_says_so(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(EnvironmentProblem, match="no such file"):
        TTTState.load(path)
    path.write_bytes(b"not a tensor")
    with pytest.raises(EnvironmentProblem, match="no safetensors file"):
        TTTState.load(path)
    layer = make()
    layer(tokens())[1].detach().save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(EnvironmentProblem, match="damaged: its header promises"):
        TTTState.load(path)


def test_reset_starts_rows_over_and_no_others():
    layer = make()
    first, second = tokens(length=6), tokens(seed=2)
    _, state = layer(first)
    y, _ = layer(second, layer.reset(state, torch.tensor([False, True])))
    straight, _ = layer(second, state)
    fresh, _ = layer(second)
    torch.testing.assert_close(y[0], straight[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[1], fresh[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(straight[1], fresh[1])


def test_bad_calls_say_what_is_wrong():
    layer = make()
    with pytest.raises(ValueError, match=r"reads \[B, T, 12\] with T ≥ 1, not \(2, 0, 12\)"):
        layer(tokens(length=0))
    with pytest.raises(ValueError, match="state is of 2 streams, the tokens of 1"):
        layer(tokens()[:1], layer(tokens())[1])
    with pytest.raises(ValueError, match=r"tokens of torch.float32 need torch.float32"):
        layer(tokens().float(), layer(tokens())[1])
    with pytest.raises(ValueError, match="rope: mini_batch"):
        layer(tokens(), rotary=(angles().cos(), angles().sin()))
    with pytest.raises(ValueError, match="needs the backbone's rotary angles"):
        make(rope="backbone")(tokens())
    with pytest.raises(ValueError, match="width 12 does not divide into 5 heads"):
        TTTLayer(12, 5, TTTConfig())
    with pytest.raises(ValueError, match="odd width 3"):
        TTTLayer(12, 4, TTTConfig())


def test_a_closed_gate_is_the_identity_and_alpha_at_zero_too():
    x = tokens(dtype=torch.float32)
    adapter = TTTAdapter(D, H, TTTConfig(mini_batch_size=C, initial_gating_alpha=0.0))
    assert torch.equal(adapter(x), x)
    opened = TTTAdapter(D, H, TTTConfig(mini_batch_size=C, initial_gating_alpha=0.5))
    model = nn.Sequential(opened)
    assert not torch.equal(model(x), x)
    with gates_closed(model):
        assert torch.equal(model(x), x)
        with gates_closed(model):
            pass
        assert torch.equal(model(x), x)
    assert not torch.equal(model(x), x)


def test_effective_weights_take_the_open_step():
    """What the last token answered with, from the definition."""
    layer = make(layer_type="mlp", learnable_token_idx=True)
    x = tokens(length=C + 3)
    _, state = layer(x)
    _, longer = layer(x[:, :-1])
    assert state.count.tolist() == [3, 3]
    scale = 1 / 3 + layer.learnable_token_idx[2]
    for w, g, found in zip(state.weights, state.gradients, layer.effective_weights(state), strict=True):
        torch.testing.assert_close(found, w - scale.clamp_min(0) * g)
    for a, b in zip(longer.weights, state.weights, strict=True):  # projected as a piece of another length
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_normalized_target_uses_its_own_deviation():
    """The unbiased deviation, which the definition above takes from torch.std."""
    x = tokens()
    one, zero = torch.ones(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    found = normalize_target(x, one, zero, eps=0.0)
    torch.testing.assert_close(found.std(-1), torch.ones(B, T, dtype=torch.float64))
