"""What learns, how fast, without decay where none belongs, and bfloat16 parameters that do learn."""

import math

import pytest
import torch
from torch import nn
from toy import ToyBackbone, ToyOptions

from ttt import inject
from ttt.config import TrainConfig, TTTConfig
from ttt.errors import ConfigError, EnvironmentProblem
from ttt.train.learnable import Learnable, choose_learnable, learning_rate_factor
from ttt.train.optim import Optimizer

BACKEND = ToyBackbone()


def adapted(config=None, *, layers="all"):
    model = BACKEND.build(ToyOptions(name="toy", num_layers=2, dim=16, num_heads=2), device="cpu", dtype=torch.float32)
    settings = {"mini_batch_size": 4, "layers": layers, "layer_type": "mlp", "qkvo_bias": True}
    injection = inject.apply(model, BACKEND.sites(model), TTTConfig(**settings))
    return model, injection


def chosen(layers="all", **settings):
    model, injection = adapted(layers=layers)
    learnable = choose_learnable(model, injection, TrainConfig(**settings), is_attention=BACKEND.is_attention)
    assert {entry.name for entry in learnable} == {name for name, p in model.named_parameters() if p.requires_grad}
    return {entry.name: entry for entry in learnable}, dict(model.named_parameters())


def test_ttt_alone_learns_by_default():
    learnable, parameters = chosen()
    assert set(learnable) == {name for name in parameters if ".ttt." in name}
    assert {name for name, entry in learnable.items() if entry.role == "gate"} == {
        "layers.0.ttt.gate.gating_alpha",
        "layers.1.ttt.gate.gating_alpha",
    }


def test_attention_learns_too_when_asked():
    learnable, _ = chosen(trainable="ttt+attention")
    backbone = {name for name, entry in learnable.items() if entry.role == "backbone"}
    assert backbone == {
        f"layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias")
    }


def test_all_means_all():
    learnable, parameters = chosen(trainable="all")
    assert set(learnable) == set(parameters)


def test_a_group_with_multiplier_zero_is_frozen():
    learnable, _ = chosen(trainable="all", weight_lr_multiplier=0.0, backbone_lr_multiplier=0.0)
    assert {entry.role for entry in learnable.values()} == {"gate"}


@pytest.mark.parametrize(
    ("layers", "settings"),
    [("none", {}), ("all", {"weight_lr_multiplier": 0.0, "alpha_lr_multiplier": 0.0})],
)
def test_nothing_to_learn_is_refused(layers, settings):
    with pytest.raises(ConfigError, match="nothing would learn"):
        chosen(layers, **settings)


def test_attention_that_cannot_be_found_is_refused():
    model, injection = adapted()
    with pytest.raises(ConfigError, match=r"ttt\+attention"):
        choose_learnable(model, injection, TrainConfig(trainable="ttt+attention"), is_attention=lambda name: False)


def test_only_matrices_decay():
    learnable, parameters = chosen(trainable="all")
    decaying = {name for name, entry in learnable.items() if entry.decays}
    expected = {"embedding.weight", "head.weight"}
    for layer in (0, 1):
        prefix = f"layers.{layer}."
        expected |= {prefix + name for name in ("self_attn.in_proj.weight", "self_attn.out_proj.weight")}
        expected |= {prefix + name for name in ("linear1.weight", "linear2.weight")}
        expected |= {prefix + f"ttt.layer.{name}_proj.weight" for name in "qkvo"}
        expected |= {prefix + f"ttt.layer.{name}" for name in ("W1", "W2")}
    assert decaying == expected
    assert {"layers.0.ttt.layer.b1", "layers.0.ttt.layer.learnable_ttt_lr_weight"} <= parameters.keys() - decaying


def one(value, *, dtype=torch.float32, role="ttt", decays=False):
    return Learnable("p", nn.Parameter(torch.tensor(value, dtype=dtype)), role, decays)


def test_groups_have_their_own_learning_rate_and_decay():
    config = TrainConfig(
        lr=0.1,
        weight_lr_multiplier=2.0,
        alpha_lr_multiplier=3.0,
        backbone_lr_multiplier=0.5,
        weight_decay=0.0,
        max_norm=1e9,
    )
    entries = [
        Learnable(role, nn.Parameter(torch.ones(3)), role, False)  # type: ignore[arg-type]
        for role in ("ttt", "gate", "backbone")
    ]
    optimizer = Optimizer(entries, config)
    for entry in entries:
        entry.parameter.grad = torch.ones(3)
    optimizer.collect()
    assert optimizer.clip() == pytest.approx(3.0)
    optimizer.step(0)
    moved = {entry.role: 1 - entry.parameter[0].item() for entry in entries}
    assert moved == pytest.approx({"ttt": 0.2, "gate": 0.3, "backbone": 0.05}, rel=1e-4)


def test_decay_acts_on_what_decays_alone():
    config = TrainConfig(lr=0.1, weight_decay=0.5)
    entries = [
        Learnable("a", nn.Parameter(torch.ones(2, 2)), "ttt", True),
        Learnable("b", nn.Parameter(torch.ones(2)), "ttt", False),
    ]
    optimizer = Optimizer(entries, config)
    for entry in entries:
        entry.parameter.grad = torch.zeros_like(entry.parameter)
    optimizer.step(0)
    assert entries[0].parameter.detach().unique().tolist() == pytest.approx([0.95])
    assert entries[1].parameter.detach().unique().tolist() == [1.0]


def test_clipping_scales_all_gradients_together():
    entries = [Learnable(name, nn.Parameter(torch.zeros(1)), "ttt", False) for name in "ab"]
    optimizer = Optimizer(entries, TrainConfig(max_norm=1.0))
    entries[0].parameter.grad, entries[1].parameter.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert optimizer.clip() == pytest.approx(5.0)
    assert [gradient.item() for _, gradient in optimizer.gradients()] == pytest.approx([0.6, 0.8], rel=1e-4)


def test_warm_up_then_cosine_to_the_floor():
    config = TrainConfig(max_steps=11, warmup_steps=4, min_lr_ratio=0.2)
    factors = [learning_rate_factor(step, config) for step in range(11)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[7] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert factors[10] == pytest.approx(0.2)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_other_schedules_fall_in_a_line_or_stay():
    shape = {"max_steps": 11, "warmup_steps": 4, "min_lr_ratio": 0.2}
    cosine, linear, constant = (
        [learning_rate_factor(step, TrainConfig(lr_schedule=schedule, **shape)) for step in range(11)]
        for schedule in ("cosine", "linear", "constant")
    )
    assert linear[:4] == constant[:4] == cosine[:4]  # they warm up alike
    assert linear[4:] == pytest.approx([1 - 0.8 * step / 6 for step in range(7)])
    assert constant[4:] == [1.0] * 7


def test_the_backbone_may_have_a_schedule_of_its_own():
    shape = {"max_steps": 5, "trainable": "all", "lr_schedule": "constant", "min_lr_ratio": 0.0}
    both = TrainConfig(backbone_lr_schedule="linear", **shape)
    assert [learning_rate_factor(step, both) for step in range(5)] == [1.0] * 5
    assert [learning_rate_factor(step, both, "gate") for step in range(5)] == [1.0] * 5
    assert [learning_rate_factor(step, both, "backbone") for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    one_for_all = TrainConfig(**shape)
    assert [learning_rate_factor(step, one_for_all, "backbone") for step in range(5)] == [1.0] * 5

    def moved(config):
        entries = [Learnable(role, nn.Parameter(torch.zeros(1)), role, False) for role in ("ttt", "backbone")]
        optimizer = Optimizer(entries, config)
        for entry in entries:
            entry.parameter.grad = torch.ones(1)
        return optimizer.step(2), [abs(entry.parameter.item()) / config.lr for entry in entries]

    rates, moves = moved(both)
    assert moves == pytest.approx([1.0, 0.5], rel=1e-4)
    assert rates == {"lr": both.lr, "backbone_lr": both.lr * 0.5}
    rates, moves = moved(one_for_all)
    assert moves == pytest.approx([1.0, 1.0], rel=1e-4)
    assert rates == {"lr": one_for_all.lr}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("settings", [{"max_steps": 1}, {"max_steps": 3, "warmup_steps": 10}])
def test_the_schedule_of_a_short_run_stays_within_bounds(settings, schedule):
    config = TrainConfig(lr_schedule=schedule, **settings)
    assert all(0 < learning_rate_factor(step, config) <= 1 for step in range(config.max_steps))


def test_bfloat16_learns_where_its_own_rounding_would_lose_every_update():
    """Steps of 1e-4 on a value of 1.0, whose neighbours in bfloat16 are 1/256 and 1/128 away."""
    plain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    adamw = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    entry = one([1.0] * 4, dtype=torch.bfloat16)
    optimizer = Optimizer([entry], TrainConfig(lr=1e-4, weight_decay=0.0, min_lr_ratio=1.0, max_steps=200))
    for step in range(200):
        plain.grad = torch.ones_like(plain)
        adamw.step()
        entry.parameter.grad = torch.ones_like(entry.parameter)
        optimizer.collect()
        optimizer.clip()
        optimizer.step(step)
    assert plain.detach().tolist() == [1.0] * 4
    assert entry.parameter.dtype == torch.bfloat16
    assert entry.parameter[0].item() == pytest.approx(0.98, abs=1 / 256)


def test_gradients_of_bfloat16_are_summed_in_float32():
    entry = one([0.0], dtype=torch.bfloat16)
    optimizer = Optimizer([entry], TrainConfig(max_norm=1e9))
    for value in (256.0, 1.0, 1.0):  # 256 + 1 rounds back to 256 in bfloat16
        entry.parameter.grad = torch.tensor([value], dtype=torch.bfloat16)
        optimizer.collect()
        assert entry.parameter.grad is None
    assert optimizer.clip() == 258.0


def test_float32_and_float64_have_no_second_copy():
    for dtype in (torch.float32, torch.float64):
        entry = one([1.0], dtype=dtype)
        assert not [name for name in Optimizer([entry], TrainConfig()).tensors() if name.startswith("master")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_continues_bit_for_bit(dtype):
    def run(optimizer, entry, steps):
        for step in steps:
            entry.parameter.grad = torch.linspace(-1, 1, 6, dtype=dtype).view(2, 3) * (step + 1)
            optimizer.collect()
            optimizer.clip()
            optimizer.step(step)

    config = TrainConfig(lr=0.01, max_steps=8)
    whole = one([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=dtype, decays=True)
    first = Optimizer([whole], config)
    run(first, whole, range(4))
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved.values()) == first.nbytes()

    resumed = Learnable("p", nn.Parameter(whole.parameter.detach().clone()), "ttt", True)
    second = Optimizer([resumed], config)
    second.load(saved, place="here")
    run(first, whole, range(4, 8))
    run(second, resumed, range(4, 8))
    assert torch.equal(whole.parameter, resumed.parameter)
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"exp_avg.other": torch.zeros(2)}), "'exp_avg.other', which no learnable"),
        (lambda state: state.update({"exp_avg.p": torch.zeros(5)}), r"has shape \[5\], the parameter \[2\]"),
        (lambda state: state.pop("exp_avg_sq.p"), "moments of 'p' are not complete"),
        (lambda state: state.pop("master.p"), "lacks a float32 copy of 'p'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_taken_over(change, message):
    entry = one([1.0, 2.0], dtype=torch.bfloat16)
    optimizer = Optimizer([entry], TrainConfig())
    entry.parameter.grad = torch.ones(2, dtype=torch.bfloat16)
    optimizer.collect()
    optimizer.step(0)
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    change(state)
    with pytest.raises(EnvironmentProblem, match=message):
        optimizer.load(state, place="optimizer.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.tensors().items())
