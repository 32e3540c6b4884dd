"""Injection: what is refused, and that a refusal changes nothing. What laws 6 and 7 cover is in test_laws.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ToyBackbone

from ttt import inject
from ttt.adapter import TTTAdapter, carried
from ttt.adapter_file import load_adapter, save_adapter
from ttt.config import TTTConfig
from ttt.errors import InjectionError, UsageError
from ttt.evidence import Observation

BACKBONE = ToyBackbone()
CONFIG = TTTConfig(mini_batch_size=4)


def model():
    return BACKBONE.build(BACKBONE.tiny(), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TTTConfig(layers=(0, 5)), r"layer 5 does not exist; the backbone's 2 layers are 0 to 1"),
        (TTTConfig(num_heads=5), r"width 16 does not divide into 5 heads"),
        (TTTConfig(num_heads=16), r"odd width 1"),
        (TTTConfig(preset="video", rope="none"), r"causal: false on a causal backbone"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(config, message):
    plain = model()
    before = {name: type(module) for name, module in plain.named_modules()}
    with pytest.raises(InjectionError, match=message):
        inject.apply(plain, BACKBONE.sites(plain), config)
    assert {name: type(module) for name, module in plain.named_modules()} == before


def test_a_minibatch_of_one_token_leaks_nothing():
    plain = model()
    config = TTTConfig(preset="video", rope="none", mini_batch_size=1)
    assert len(inject.apply(plain, BACKBONE.sites(plain), config).adapters) == 2


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2, 3]), ("middle", [1, 2]), ("none", []), ("3,1", [1, 3]), ([2], [2]), (0, [0])],
)
def test_layers_are_the_ones_named(layers, expected):
    plain = BACKBONE.build(BACKBONE.options(name="toy", num_layers=4), device="cpu", dtype=torch.float32)
    injection = inject.apply(plain, BACKBONE.sites(plain), TTTConfig.model_validate({"layers": layers}))
    assert list(injection.adapters) == [f"layers.{layer}.ttt" for layer in expected]


def test_sites_that_would_change_the_backbone_are_refused():
    plain = model()
    sites = BACKBONE.sites(plain)
    with pytest.raises(InjectionError, match="Linear is not a subclass"):
        inject.apply(
            plain, [dataclasses.replace(sites[0], subclass=nn.Linear)], TTTConfig(layers=(0,), mini_batch_size=4)
        )
    with pytest.raises(InjectionError, match="two sites for one layer"):
        inject.plan([sites[0], sites[0]], CONFIG)


def test_values_depend_on_seed_and_layer_alone():
    def values(seed, layers):
        plain = model()
        torch.manual_seed(torch.randint(1000, ()).item())
        config = TTTConfig.model_validate({"layers": layers, "mini_batch_size": 4})
        found = inject.apply(plain, BACKBONE.sites(plain), config, seed=seed)
        return {name: value.clone() for name, value in found.state_dict().items()}

    one, both = values(0, [1]), values(0, "all")
    assert all(torch.equal(both[name], value) for name, value in one.items())
    assert not torch.equal(both["layers.0.ttt.layer.W1"], both["layers.1.ttt.layer.W1"])
    assert not torch.equal(values(1, [1])["layers.1.ttt.layer.W1"], one["layers.1.ttt.layer.W1"])


def test_adapters_follow_the_site_in_mode_device_and_width():
    plain = model().train()
    assert all(a.training for a in inject.apply(plain, BACKBONE.sites(plain), CONFIG).adapters.values())
    narrow = BACKBONE.build(BACKBONE.tiny(), device="meta", dtype=torch.bfloat16)
    tensors = inject.apply(narrow, BACKBONE.sites(narrow), CONFIG).state_dict()
    assert {(value.device.type, value.dtype) for value in tensors.values()} == {("meta", torch.float32)}


def test_loading_tensors_that_do_not_fit_names_each_and_changes_nothing():
    plain = model()
    injection = inject.apply(plain, BACKBONE.sites(plain), CONFIG)
    before = {name: value.clone() for name, value in injection.state_dict().items()}
    wrong = {name: value + 1 for name, value in before.items()}
    del wrong["layers.0.ttt.gate.gating_alpha"]
    wrong["layers.1.ttt.layer.W1"] = torch.zeros(1)
    wrong["extra"] = torch.zeros(1)
    with pytest.raises(InjectionError, match=r"gating_alpha is missing; extra is unknown; .*W1 is \[1\], not"):
        injection.load_state_dict(wrong)
    assert all(torch.equal(value, before[name]) for name, value in injection.state_dict().items())
    right = {name: value + 1 for name, value in before.items()}
    injection.load_state_dict(right)
    assert all(torch.equal(value, right[name]) for name, value in injection.state_dict().items())


def test_carried_states_join_windows_and_a_recomputation_starts_where_the_pass_did():
    """Two windows with the state carried are one long one for TTT; under checkpointing gradients stay the same."""
    adapter_model = model()
    injection = inject.apply(adapter_model, BACKBONE.sites(adapter_model), CONFIG)
    adapter = injection.adapters["layers.0.ttt"]
    assert isinstance(adapter, TTTAdapter)
    x = torch.randn(2, 13, 16, generator=torch.Generator().manual_seed(0))
    whole, _ = adapter.adapt(x)
    with carried(injection) as carry:
        adapter(x[:, :6])
    states = carry.states
    assert list(states) == ["layers.0.ttt"]
    assert not states["layers.0.ttt"].weights[0].requires_grad
    with carried(injection, states) as carry:
        second = adapter(x[:, 6:])
    torch.testing.assert_close(second, whole[:, 6:], rtol=1e-5, atol=1e-5)
    assert adapter.port is None

    batch = BACKBONE.example_batch(adapter_model, batch_size=2, tokens=9, seed=0)
    with carried(injection) as carry:
        BACKBONE.outputs(adapter_model, batch)
    gradients = []
    for checkpointing in (False, True):
        BACKBONE.set_gradient_checkpointing(adapter_model, checkpointing)
        adapter_model.zero_grad()
        with carried(injection, carry.states):
            BACKBONE.outputs(adapter_model, batch).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter_model.named_parameters() if p.grad is not None})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-6, atol=1e-9)
    with (
        pytest.raises(ValueError, match="states for nowhere, but nothing is injected there"),
        carried(injection, {"nowhere": carry.states["layers.0.ttt"]}),
    ):
        pass


def test_evidence_is_of_the_pass_that_was_watched():
    plain = model()
    injection = inject.apply(plain, BACKBONE.sites(plain), CONFIG)
    batch = BACKBONE.example_batch(plain, batch_size=2, tokens=9, seed=0)
    with Observation(injection) as seen:
        assert seen.reached == frozenset()
        BACKBONE.outputs(plain, batch)
    assert seen.reached == {"layers.0.ttt", "layers.1.ttt"}
    found = seen.layers()["layers.0.ttt"]
    assert found.inner_loss_after < found.inner_loss_before
    assert found.movement > 0
    assert found.gate == pytest.approx(torch.tanh(torch.tensor(0.1)).item())
    with torch.no_grad():
        for adapter in injection.adapters.values():
            adapter.layer.learnable_ttt_lr_bias.fill_(-1e9)  # rates of zero: nothing is learned
    with Observation(injection) as seen:
        BACKBONE.outputs(plain, batch)
    still = seen.layers()["layers.0.ttt"]
    assert still.movement == 0
    assert still.inner_loss_after == still.inner_loss_before
    with torch.no_grad():
        for name, parameter in injection.adapters["layers.0.ttt"].named_parameters():
            if name in ("layer.W1", "layer.b1"):
                parameter.zero_()  # their norm is divided by
    with Observation(injection) as seen:
        BACKBONE.outputs(plain, batch)
    assert seen.layers()["layers.0.ttt"].movement == 0


# --- paths of sites ---


def with_first_site(**changes):
    """The toy's model, and its sites with the first one changed."""
    plain = model()
    first, *others = BACKBONE.sites(plain)
    return plain, [dataclasses.replace(first, **changes), *others]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "blocks.0"}, r"layer 0: its path 'blocks.0' names no module of the model; .* goes by 'layers.0'"),
        ({"path": "layers.0."}, r"'layers.0.' names no module"),
        ({"path": "module.layers.0"}, r"'module.layers.0' names no module"),
        ({"path": "layers.1"}, r"'layers.1' leads to another module, a Block; its module, a Block, goes by 'layers.0'"),
        ({"path": "layers.0.norm1"}, r"leads to another module, a LayerNorm"),
        ({"path": ""}, r"its path '' leads to another module, a ToyModel"),
        ({"attribute": "my.ttt"}, r"attribute 'my.ttt' is not a name that a module can give a child"),
        ({"attribute": ""}, r"attribute '' is not a name"),
        ({"attribute": "class"}, r"attribute 'class' is not a name"),
        ({"attribute": "ttt-layer"}, r"attribute 'ttt-layer' is not a name"),
        ({"layer": 2}, r"numbers the layers of its 2 sites 1, 2; they count from 0"),
    ],
)
def test_a_site_must_say_where_its_module_is(changes, message):
    plain, sites = with_first_site(**changes)
    before = {name: type(module) for name, module in plain.named_modules()}
    with pytest.raises(InjectionError, match=message):
        inject.apply(plain, sites, CONFIG)
    assert {name: type(module) for name, module in plain.named_modules()} == before


def test_a_site_of_another_model_is_refused():
    with pytest.raises(InjectionError, match=r"'layers.0'\): its Block is not a module of the model"):
        inject.apply(model(), BACKBONE.sites(model()), CONFIG)


def test_a_module_of_two_names_goes_by_the_one_that_its_parameters_have():
    plain = model()
    plain.body = plain.layers
    sites = BACKBONE.sites(plain)
    with pytest.raises(InjectionError, match=r"'body.0' is a second name of its module; .* goes by 'layers.0'"):
        inject.apply(plain, [dataclasses.replace(site, path=f"body.{site.layer}") for site in sites], CONFIG)
    injection = inject.apply(plain, sites, CONFIG)
    assert set(injection.state_dict()) <= dict(plain.named_parameters()).keys()


def test_a_site_may_be_the_model_itself():
    class Reading(nn.Linear):
        def forward(self, x):
            return self.ttt(super().forward(x))

    plain = nn.Linear(16, 16)
    site = inject.Site(layer=0, path="", module=plain, dim=16, num_heads=2, subclass=Reading)
    injection = inject.apply(plain, [site], CONFIG)
    assert list(injection.adapters) == ["ttt"]
    assert set(injection.state_dict()) <= dict(plain.named_parameters()).keys()


@pytest.mark.parametrize("wrapped", ["model", "layer"])
def test_a_path_need_not_know_of_wrappers(wrapped):
    plain = outer = model()
    sites = BACKBONE.sites(plain)
    if wrapped == "model":
        outer = nn.DataParallel(plain)
    else:
        plain.layers[0] = checkpoint_wrapper(plain.layers[0])
    injection = inject.apply(outer, sites, CONFIG)
    assert list(injection.adapters) == ["layers.0.ttt", "layers.1.ttt"]
    assert injection.adapters["layers.0.ttt"] is sites[0].module.ttt


def test_one_adapter_for_two_layers_is_refused():
    plain = model()
    shared = TTTAdapter(16, 2, CONFIG)
    sites = [dataclasses.replace(site, adapter=lambda *_, **__: shared) for site in BACKBONE.sites(plain)]
    with pytest.raises(InjectionError, match="share one adapter"):
        inject.apply(plain, sites, CONFIG)


# --- a model for inference alone ---


class _Casts(TorchDispatchMode):
    """Counts casts of a matrix of D² numbers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.numbers, self.count = dim * dim, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        casts = func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype) and y.dtype != args[0].dtype
        self.count += casts and y.numel() == self.numbers
        return y


def narrow(config: TTTConfig = CONFIG):
    plain = BACKBONE.build(BACKBONE.tiny(), device="cpu", dtype=torch.bfloat16)
    return plain, inject.apply(plain, BACKBONE.sites(plain), config)


@torch.no_grad()
def test_for_inference_no_token_casts_a_projection_and_answers_are_the_same() -> None:
    plain, injection = narrow(TTTConfig(mini_batch_size=4, initial_gating_alpha=0.5, qkvo_bias=True))
    layer = next(iter(injection.adapters.values())).layer
    for parameter in layer.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 9, layer.dim, generator=torch.Generator().manual_seed(2)).bfloat16()

    def read():
        state = layer.streaming_state(4)
        with _Casts(layer.dim) as casts:
            steps = [layer.step_(x[:, t : t + 1], state) for t in range(9)]
        return (plain(tokens), layer(x)[0]), (torch.cat(steps, 1), *state.memory().values()), casts.count

    wholes, tokens_before, cast = read()
    injection.for_inference()
    wholes_for_inference, tokens_after, cast_for_inference = read()
    assert (cast, cast_for_inference) == (4 * 9, 0)
    assert all(torch.equal(a, b) for a, b in zip(wholes_for_inference, wholes, strict=True))
    for a, b in zip(tokens_after, tokens_before, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)  # tokens are bfloat16
    with pytest.raises(ValueError, match=r"its projections in torch\.bfloat16, and reads no tokens of torch\.float32"):
        layer(x.float())


def test_rounded_adapters_are_neither_saved_nor_loaded(tmp_path):
    plain, injection = narrow()
    options = {"name": "toy"}
    save_adapter(tmp_path / "before", injection, backbone=options)
    injection.for_inference()
    held = {name: value.clone() for name, value in injection.state_dict().items()}
    with pytest.raises(UsageError, match="this model is for inference alone: its adapters' projections are rounded"):
        save_adapter(tmp_path / "after", injection, backbone=options)
    assert not (tmp_path / "after").exists()
    with pytest.raises(UsageError, match="for inference alone"):
        load_adapter(tmp_path / "before", plain, injection=injection, backbone=options)
    assert all(torch.equal(value, held[name]) for name, value in injection.state_dict().items())


def test_a_float32_model_is_as_it_was_for_inference(tmp_path):
    """What it holds beside the parameters takes nothing from them: they are saved as they were, and learn."""
    plain = model()
    injection = inject.apply(plain, BACKBONE.sites(plain), CONFIG)
    before = list(plain.parameters())
    save_adapter(tmp_path / "before", injection, backbone={"name": "toy"})
    injection.for_inference()
    assert all(adapter.layer.held is not None for adapter in injection.adapters.values())
    assert all(a is b and a.requires_grad for a, b in zip(plain.parameters(), before, strict=True))
    save_adapter(tmp_path / "after", injection, backbone={"name": "toy"})
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("before", "after")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]] != []
