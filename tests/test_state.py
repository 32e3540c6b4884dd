"""States: what a layer accepts, what is written, and how they go in and out of an adapted model."""

from __future__ import annotations

import stat

import pytest
import torch
from toy import ToyBackbone

from ttt import TTTConfig, TTTLayer, TTTState, inject
from ttt.adapter import carried
from ttt.errors import EnvironmentProblem, InjectionError
from ttt.evidence import Observation

DIM = 16


def layer(num_heads=2, dim=DIM, **settings):
    settings.setdefault("mini_batch_size", 4)
    return TTTLayer(dim, num_heads, TTTConfig(**settings))


def state_of(other, tokens=6, batch=2):
    return other(torch.randn(batch, tokens, other.dim))[1]


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (layer(layer_type="mlp"), layer()),
        (layer(), layer(layer_type="mlp")),
        (layer(layer_type="mlp"), layer(layer_type="mlp", mlp_layers=3)),
        (layer(), layer(dim=8, num_heads=1)),  # one head, which would broadcast to both
    ],
    ids=["linear in mlp", "mlp in linear", "deeper", "fewer heads"],
)
def test_a_state_of_another_layer_is_refused(own, other):
    with pytest.raises(ValueError, match="the state is of another layer"):
        own(torch.randn(2, 3, DIM), state_of(other))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_state_from_larger_mini_batches_is_refused(tokens):
    with pytest.raises(ValueError, match="a stream has read 10 tokens of its open mini-batch, here they are of 4"):
        layer()(torch.randn(2, tokens, DIM), state_of(layer(mini_batch_size=16), tokens=10))


def test_whole_numbers_are_no_tokens():
    with pytest.raises(ValueError, match=r"floating point, not torch\.int64"):
        layer()(torch.ones(2, 3, DIM, dtype=torch.int64))


@pytest.mark.parametrize("tokens", [4, 6])
def test_save_and_load(tmp_path, tokens):
    state = state_of(layer(), tokens)
    path = tmp_path / "state.safetensors"
    state.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    loaded = TTTState.load(path).tensors()
    assert loaded.keys() == state.tensors().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.tensors().items())


def test_saving_and_loading_fail_in_a_sentence(tmp_path):
    state = state_of(layer())
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        state.save(tmp_path / "file" / "state")
    with pytest.raises(EnvironmentProblem, match="no such file"):
        TTTState.load(tmp_path / "nothing")
    with pytest.raises(EnvironmentProblem, match="cannot be read"):
        TTTState.load(tmp_path)
    (tmp_path / "short").write_bytes(b"\x00" * 5)
    with pytest.raises(EnvironmentProblem, match="cut short"):
        TTTState.load(tmp_path / "short")


@pytest.mark.parametrize("causal", [True, False])
def test_a_piece_costs_its_own_length_and_not_a_mini_batch(causal):
    """A grid of 2^20 slots and their attention would not fit into any memory."""
    huge = layer(mini_batch_size=1 << 20, causal=causal, rope="none", learnable_token_idx=False)
    x = torch.randn(2, 9, DIM)
    whole, end = huge(x)
    if causal:
        first, state = huge(x[:, :4])
        second, pieces_end = huge(x[:, 4:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole)
        for name, tensor in end.tensors().items():
            torch.testing.assert_close(pieces_end.tensors()[name], tensor)
    else:
        assert end.count is None
        assert not torch.equal(end.weights[0], huge.initial_state(2).weights[0])


def adapted(**settings):
    backbone = ToyBackbone()
    model = backbone.build(backbone.tiny(), device="cpu", dtype=torch.float32)
    return model, inject.apply(model, backbone.sites(model), TTTConfig(mini_batch_size=4, **settings))


def test_carrying_inside_carrying_gives_the_outer_states_back():
    model, injection = adapted()
    tokens = torch.randint(16, (2, 9))
    with carried(injection) as outer:
        model(tokens)
        first = outer.states
        with carried(injection, first) as inner:
            model(tokens)
        model(tokens[:, :3])
    for name, state in outer.states.items():
        assert state is not first[name]
        assert state.count is not None
        assert state.count.tolist() == [3, 3]
        assert not torch.equal(inner.states[name].weights[0], first[name].weights[0])


def test_evidence_outlives_the_injection():
    model, injection = adapted()
    names = set(injection.adapters)
    with Observation(injection) as evidence:
        model(torch.randint(16, (2, 9)))
    injection.eject()
    assert set(evidence.layers()) == names


class Route(torch.nn.Module):
    def forward(self, x):
        return x


class RouteWithTTT(Route):
    def forward(self, x):
        return self.ttt(super().forward(x))


def test_a_site_without_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM, dtype=torch.float64), Route())
    injection = inject.apply(model, [inject.Site(0, "1", model[1], DIM, 2, RouteWithTTT)], TTTConfig())
    assert {tensor.dtype for tensor in injection.state_dict().values()} == {torch.float64}


def test_one_module_cannot_be_two_sites():
    """Both adapters would go by one name, and the first be lost."""
    model = torch.nn.Sequential(Route())
    sites = [inject.Site(number, "0", model[0], DIM, 2, RouteWithTTT) for number in (0, 1)]
    with pytest.raises(InjectionError, match="one module as the site of two layers"):
        inject.apply(model, sites, TTTConfig())
    assert type(model[0]) is Route
