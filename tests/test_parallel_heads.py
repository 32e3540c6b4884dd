"""A TTT layer shared out among processes, by heads or by tokens, against the whole layer: one group makes every check."""

from __future__ import annotations

import contextlib
import copy

import pytest
import ranks
import torch
from torch import distributed as dist
from torch import nn

from ttt.adapter import TTTAdapter
from ttt.config import TTTConfig
from ttt.evidence import Observation
from ttt.layer import TTTLayer
from ttt.ops.norm import outer_layer_norm
from ttt.parallel import heads
from ttt.parallel.heads import gather_state, shard_heads, shard_state
from ttt.state import TTTState

D, H, B = 96, 12, 2
WIDTH = D // H
SIZES = (2, 3, 4)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

SETTINGS = {
    "linear": {"mini_batch_size": 4},
    "mlp": {"layer_type": "mlp", "mini_batch_size": 4, "qkvo_bias": True, "scan_checkpoint_group_size": 1},
    "deep": {
        **{"layer_type": "mlp", "mlp_layers": 3, "mlp_hidden_dims": [5, 3], "mini_batch_size": 3},
        **{"input_norm": "rms", "normalize_qk": True, "normalize_target": True, "skip_nonfinite_tokens": True},
    },
    "video": {"preset": "video", "layer_type": "mlp", "mini_batch_size": 4},
}
"""Every kind of layer; between them they use every parameter and every branch that asks how heads are shared."""


def make(name, dtype=torch.float64):
    """A layer in which every parameter acts, the same in every process."""
    layer = TTTLayer(D, H, TTTConfig.model_validate(SETTINGS[name]), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    layer.reset_parameters(generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return layer


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Case:
    """What a layer reads: tokens, a state before them, angles, a mask."""

    def __init__(self, name, dtype=torch.float64, *, length=11, masked=False, carried=False):
        self.layer, self.dtype = make(name, dtype), dtype
        self.x = draw(B, length, D, seed=1, dtype=dtype)
        if self.layer.config.skip_nonfinite_tokens:
            self.x[0, 2, 3] = torch.nan
        self.x[1, 4] = 0  # a constant vector, whose answer may be constant too
        self.mask = None
        if masked:
            self.mask = torch.ones(B, length, dtype=torch.bool)
            self.mask[0, :2] = self.mask[1, length // 2 :] = False
        self.rotary = None
        if self.layer.config.rope == "backbone":
            angles = draw(length, WIDTH // 2, seed=5, dtype=dtype) * 4
            self.rotary = angles.cos(), angles.sin()
        self.state = None
        if carried:
            with torch.no_grad():
                self.state = self.layer(draw(B, 8 if self.rotary else 6, D, seed=8, dtype=dtype), rotary=self._before)[1]

    @property
    def _before(self):
        if self.rotary is None:
            return None
        angles = draw(8, WIDTH // 2, seed=6, dtype=self.dtype)
        return angles.cos(), angles.sin()


def leaves(state):
    """A copy of a state whose floating point tensors ask for gradients."""
    if state is None:
        return None
    return TTTState.from_tensors(
        {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in state.tensors().items()}
    )


def wanted(y, state, share=lambda x, dim: x):
    """A loss that asks for every number: of y by its own weight, and of the state's."""
    loss = (y * draw(*y.shape, seed=11, dtype=y.dtype)).sum()
    for seed, x in enumerate((*state.weights, *(state.gradients or ())), 20):
        whole = draw(B, H, *x.shape[2:], seed=seed, dtype=x.dtype)
        loss = loss + (x * share(whole, 1)).sum()
    return loss


def run(layer, case, state, share=lambda x, dim: x):
    """Forward and backward; the answers, the state after, and the gradient of x and of the state."""
    x = case.x.clone().requires_grad_()
    state = leaves(state)
    y, after = layer(x, state, rotary=case.rotary, mask=case.mask)
    wanted(y, after, share).backward()
    grads = {} if state is None else {n: t.grad for n, t in state.tensors().items() if t.grad is not None}
    return y.detach(), after.detach(), x.grad, grads


def near(found, expected, tolerance, what):
    """Require equality within the tolerance, relative to the largest number."""
    assert found.shape == expected.shape, what
    assert torch.equal(found.isnan(), expected.isnan()), what
    found, expected = found.nan_to_num(), expected.nan_to_num()
    error = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, f"{what} differs by {error:.2e}"


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def agrees_by_heads(mesh, case):
    """Answers, states and all gradients are the whole layer's."""

    def share(x, dim=1):
        return x.chunk(mesh.size(), dim)[mesh.get_local_rank()]

    tolerance = TOLERANCE[case.dtype]
    mine = shard_heads(copy.deepcopy(case.layer), mesh)
    y, after, gradient, of_state = run(case.layer, case, case.state)
    state = None if case.state is None else shard_state(case.state, mesh)
    y2, after2, gradient2, of_state2 = run(mine, case, state, share)
    parts = {name: None if p.grad is None else full(p.grad) for name, p in mine.named_parameters()}
    whole = gather_state(after2, mesh).tensors()
    near(y2, y, tolerance, "y")
    near(gradient2, gradient, tolerance, "the gradient of x")
    assert whole.keys() == after.tensors().keys()
    for name, x in after.tensors().items():
        near(whole[name], x, tolerance, f"the state's {name}")
    for name, x in of_state.items():
        near(of_state2[name], share(x), tolerance, f"the gradient of the state's {name}")
    for name, parameter in case.layer.named_parameters():
        if parameter.grad is None:  # W and b, if no stream starts here
            assert case.state is not None and parts[name] is None
            continue
        near(parts[name], parameter.grad, tolerance, f"the gradient of {name}")


# --- what one group of processes checks ---


def checks():
    meshes = {size: dist.device_mesh.DeviceMesh("cpu", list(range(size))) for size in SIZES}
    found = {}

    def add(name, size, check):
        mesh = meshes[size]
        found[f"{name}, {size}"] = lambda: check(mesh) if dist.get_rank() < size else None

    for size in SIZES:
        for name in SETTINGS:
            add(f"heads {name}", size, lambda mesh, name=name: agrees_by_heads(mesh, Case(name)))
    for name in SETTINGS:
        add(f"heads {name} masked", 2, lambda mesh, name=name: agrees_by_heads(mesh, Case(name, masked=True)))
        add(f"heads {name} carried", 3, lambda mesh, name=name: agrees_by_heads(mesh, Case(name, carried=True)))
        add(f"heads {name} float32", 4, lambda mesh, name=name: agrees_by_heads(mesh, Case(name, torch.float32)))
    return found


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    return ranks.reports("test_parallel_heads", "checks", max(SIZES), tmp_path_factory.mktemp("group"))


def test_a_layer_of_some_heads_in_each_process_is_the_whole_layer(reported):
    wrong = {name: text for name, text in reported.items() if name.startswith("heads ") and text}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
    assert sum(name.startswith("heads ") for name in reported) == len(SETTINGS) * 6
