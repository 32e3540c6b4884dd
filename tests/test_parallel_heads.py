"""A TTT layer shared out among processes, by heads or by tokens, against the whole layer; one group checks it all."""

from __future__ import annotations

import contextlib
import copy
import sys
from types import SimpleNamespace

import pytest
import ranks
import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ttt.adapter import TTTAdapter
from ttt.communication import Handed, heads_backward, heads_forward, tokens_forward
from ttt.config import TTTConfig
from ttt.evidence import Observation
from ttt.inner_curves import InnerCurves
from ttt.layer import TTTLayer
from ttt.ops.norm import outer_layer_norm
from ttt.parallel import heads
from ttt.parallel.heads import gather_state, shard_heads, shard_state
from ttt.parallel.sequence import SharedTokens, backward, own_tokens, shard_tokens, sum_gradients
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
                self.state = self.layer(draw(B, 8 if self.rotary else 6, D, seed=8, dtype=dtype), rotary=self._before)[
                    1
                ]

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
    found, expected = found.detach().nan_to_num(), expected.detach().nan_to_num()
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
            assert case.state is not None
            assert parts[name] is None
            continue
        near(parts[name], parameter.grad, tolerance, f"the gradient of {name}")


def streams_by_heads(mesh, name):
    """`step_`, token by token with a paused row, is the whole layer's; so are states that are reset."""
    whole, rows = make(name), torch.tensor([True, False])
    mine = shard_heads(copy.deepcopy(whole), mesh)
    state, other = whole.streaming_state(B, dtype=torch.float64), mine.streaming_state(B, dtype=torch.float64)
    for seed in range(6):
        x = draw(B, 1, D, seed=seed)
        read = rows if seed == 3 else None
        with torch.no_grad():
            y, y2 = (of.step_(x, s, rows=read) for of, s in ((whole, state), (mine, other)))
        near(y2[:1], y[:1], 1e-12, "y")
    reset, other = whole.reset(state, rows), gather_state(mine.reset(other, rows), mesh)
    for name, x in reset.tensors().items():
        near(other.tensors()[name], x, 1e-12, name)


def shows_by_heads(mesh, name):
    """Traces, evidence and inner curves are the whole layer's."""
    case = Case(name, masked=True)
    adapters = [TTTAdapter(D, H, case.layer.config, dtype=torch.float64) for _ in range(2)]
    adapters[0].layer, adapters[1].layer = case.layer, shard_heads(copy.deepcopy(case.layer), mesh)
    given = {"rotary": case.rotary, "mask": case.mask}
    found = [[*of.layer.trace(case.x, **given), *of.layer.trace_minibatches(case.x, **given)] for of in adapters]
    for one, two in zip(*found, strict=True):
        near(two, one, 1e-12, "a trace")
    measured = []
    for adapter in adapters:
        injection = SimpleNamespace(adapters={"here": adapter})
        with torch.no_grad(), Observation(injection) as evidence, InnerCurves(injection) as curves:
            _, state = adapter.adapt(case.x, **given)
            if case.layer.config.causal:  # the second row is set back to the layer's own weights
                adapter.adapt(case.x, adapter.layer.reset(state, torch.tensor([False, True])), **given)
        measured.append((evidence.layers()["here"], curves.curves()["here"]))
    for one, two in zip(vars(measured[0][0]).values(), vars(measured[1][0]).values(), strict=True):
        near(torch.tensor(two), torch.tensor(one), 1e-12, "evidence")
    for one, two in zip(measured[0][1], measured[1][1], strict=True):
        near(torch.tensor(two), torch.tensor(one), 1e-6, "an inner curve")


def reads_angles_of_heads(mesh):
    """Rotary angles may differ from head to head."""
    case = Case("video")
    angles = draw(H, case.x.shape[1], WIDTH // 2, seed=9)
    case.rotary = angles.cos(), angles.sin()
    agrees_by_heads(mesh, case)


def refuses(mesh):
    """What cannot be shared out is refused in a sentence, and is as it was."""
    layer = TTTLayer(10, 5, TTTConfig(), device="meta")
    before = [*layer.named_parameters()]
    with pytest.raises(ValueError, match=f"the 5 heads of a TTT layer cannot be divided evenly among {mesh.size()}"):
        shard_heads(layer, mesh)
    assert all(a is b for (_, a), (_, b) in zip(before, layer.named_parameters(), strict=True))
    mine = shard_heads(make("linear"), mesh)
    with pytest.raises(ValueError, match="shared out among processes already"):
        shard_heads(mine, mesh)
    with pytest.raises(ValueError, match="the state is of another layer"):
        mine(draw(B, 3, D, seed=1), make("linear").initial_state(B, dtype=torch.float64))


def agrees_by_tokens(mesh, case, *, reverse=False, sizes=None):
    """Answers, states and all gradients of a layer whose tokens are shared out, in one direction or both."""
    tolerance, size = TOLERANCE[case.dtype], mesh.size()

    def share(x, dim=1):
        return x.chunk(size, dim)[mesh.get_local_rank()]

    def own(x, dim=1):
        return x.tensor_split(size, dim) if sizes is None else x.split(sizes, dim)

    def mine_of(x, dim=1):
        return own(x, dim)[mesh.get_local_rank()]

    def turned(x, dim=1):
        return x.flip(dim) if reverse else x

    x = turned(case.x).clone().requires_grad_()
    state = leaves(case.state)
    y, after = case.layer(x, state, rotary=case.rotary, mask=case.mask)
    wanted(y, after).backward()

    mine = shard_tokens(copy.deepcopy(case.layer), mesh, lengths=None if sizes is None else sizes)
    reader = backward(mine) if reverse else mine
    part = mine_of(case.x).clone().requires_grad_()
    state2 = leaves(None if case.state is None else shard_state(case.state, mesh))
    rotary = None if case.rotary is None else tuple(mine_of(turned(a, 0), 0) for a in case.rotary)
    mask = None if case.mask is None else mine_of(turned(case.mask))
    y2, after2 = reader(part, state2, rotary=rotary, mask=mask)
    cotangent = mine_of(turned(draw(*case.x.shape, seed=11, dtype=case.dtype)))
    loss = (y2 * cotangent).sum()
    for seed, t in enumerate((*after2.weights, *(after2.gradients or ())), 20):
        loss = loss + (t * share(draw(B, H, *t.shape[2:], seed=seed, dtype=t.dtype))).sum()
    loss.backward()
    sum_gradients(mine.parameters(), mesh)

    whole = gather_state(after2, mesh).tensors()
    near(y2.detach(), mine_of(turned(y.detach())), tolerance, "y")
    near(part.grad, mine_of(turned(x.grad)), tolerance, "the gradient of x")
    for name, t in after.detach().tensors().items():
        near(whole[name], t, tolerance, f"the state's {name}")
    if state is not None:
        for name, t in state.tensors().items():
            if t.grad is not None:
                near(state2.tensors()[name].grad, share(t.grad), tolerance, f"the gradient of the state's {name}")
    for (name, parameter), other in zip(case.layer.named_parameters(), mine.parameters(), strict=True):
        if parameter.grad is None:
            assert case.state is not None
            assert other.grad is None
            continue
        near(other.grad, parameter.grad, tolerance, f"the gradient of {name}")


def shows_by_tokens(mesh, name):
    """Traces of a layer whose tokens are shared out are the whole layer's."""
    case = Case(name, masked=True)
    mine = shard_tokens(copy.deepcopy(case.layer), mesh)
    rotary = None if case.rotary is None else tuple(own_tokens(a, mesh, 0) for a in case.rotary)
    given, part = {"rotary": case.rotary, "mask": case.mask}, own_tokens(case.x, mesh)
    given2 = {"rotary": rotary, "mask": own_tokens(case.mask, mesh)}
    for one, two in zip(case.layer.trace(case.x, **given), mine.trace(part, **given2), strict=True):
        near(two, own_tokens(one, mesh), 1e-12, "a trace")
    found = case.layer.trace_minibatches(case.x, **given), mine.trace_minibatches(part, **given2)
    for one, two in zip(*found, strict=True):
        near(two, one, 1e-12, "a trace")


def refuses_tokens(mesh):
    """A sequence too short, tokens one by one, and other tokens than were told of are refused in a sentence."""
    mine = shard_tokens(make("linear"), mesh)
    with pytest.raises(ValueError, match="leave some without any"):
        mine(draw(B, int(mesh.get_local_rank() > 0), D, seed=1))
    with pytest.raises(ValueError, match="cannot be read one by one"):
        mine.step_(draw(B, 1, D, seed=1), mine.streaming_state(B, dtype=torch.float64))
    told = shard_tokens(make("linear"), mesh, lengths=[3] * mesh.size())
    with pytest.raises(ValueError, match="was given 2"):
        told(draw(B, 2, D, seed=1))


def keeps_its_own_tokens(mesh, *, checkpointed=True):
    """Between forward and backward, blocks under activation checkpointing keep bytes of their own tokens alone."""
    size, length, depth = mesh.size(), 24, 3
    config = TTTConfig.model_validate({**SETTINGS["video"], "rope": "none"})

    def kept(layer, x):
        held = {}

        def pack(t):
            if t.dim():
                held[t.data_ptr()] = t.numel() * t.element_size()
            return t

        of = [layer] * depth
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for one in of:
                x = checkpoint(lambda x, one=one: x + one(x)[0], x, use_reentrant=False)
        return sum(held.values())

    x = draw(B, length, D, seed=1).requires_grad_()
    layer = make("video")
    layer.config = config
    whole = kept(layer, x)
    mine = kept(shard_tokens(copy.deepcopy(layer), mesh), own_tokens(x.detach(), mesh).clone().requires_grad_())
    assert whole == depth * x.numel() * x.element_size()
    assert mine * size == whole, f"{mine} bytes are kept of {whole} in {size} processes"


KINDS = {
    **{"all_reduce": "summed", "allreduce_": "summed"},
    **{"allgather_": "gathered", "all_to_all_single": "exchanged"},
}


class Counting(TorchDispatchMode):
    """Counts the bytes that are handed to collectives."""

    def __init__(self):
        super().__init__()
        self.handed = Handed()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = func._opname
            given = args[1] if kind == "allgather_" else args[0]
            size = sum(t.numel() * t.element_size() for t in (given if isinstance(given, (list, tuple)) else [given]))
            if not kind.startswith(("wait", "_wrap")):
                self.handed += Handed(**{KINDS[kind]: size})
        return func(*args, **(kwargs or {}))


def hands_over(mesh, name, how):
    """Forward and backward hand to collectives what the closed forms say, to the byte."""
    case, size = Case(name, torch.float32, length=12), mesh.size()
    given = {"dim": D, "tokens": 12, "batch_size": B}
    if how == "heads":
        layer, x, rotary = shard_heads(case.layer, mesh), case.x, case.rotary
        expected = heads_forward(**given), heads_backward(layer.config, **given)
    else:
        layer, x = shard_tokens(case.layer, mesh, lengths=[12 // size] * size), own_tokens(case.x, mesh)
        rotary = None if case.rotary is None else tuple(own_tokens(a, mesh, 0) for a in case.rotary)
        expected = (tokens_forward(num_heads=H, processes=size, **given),) * 2
    with Counting() as forward:
        y, _ = layer(x.clone().requires_grad_(), rotary=rotary)
    with Counting() as backwards:
        y.sum().backward()
    found = forward.handed, backwards.handed
    assert found == expected, f"{found}, not {expected}"


# --- layers that are wrong: each must be caught ---


@contextlib.contextmanager
def replaced(place, name, function):
    before = getattr(place, name)
    setattr(place, name, function)
    try:
        yield
    finally:
        setattr(place, name, before)


def caught(mesh, place, name, function, says, check=lambda mesh: agrees_by_heads(mesh, Case("mlp"))):
    """Replace a function by a wrong one; the check must fail, and say this."""
    with replaced(place, name, function), pytest.raises(AssertionError, match=says):
        check(mesh)


def own_norm(self, z, gamma, beta, *, eps):
    return outer_layer_norm(z, gamma, beta, eps=eps)


def counted_by_all(x, mesh):
    """A sum whose gradient is summed too, although every process has it."""
    return heads.read_by_all(heads_summed(x, mesh), mesh)


heads_summed = heads.summed
SABOTEURS = {
    "forgets the all-reduce": (heads, "summed", lambda x, mesh: x, "y differs"),
    "normalises over its own heads": (heads.SharedHeads, "layer_norm", own_norm, "y differs"),
    "keeps the gradient of its own heads": (heads, "read_by_all", lambda x, mesh: x, "gradient of x differs"),
    "counts a replicated gradient in each process": (heads, "summed", counted_by_all, "gradient of (x|W1|.*) differs"),
    "forgets the other heads' movement": (
        *(heads.SharedHeads, "sum_over_heads", lambda self, x: x, "a trace|evidence"),
        lambda mesh: shows_by_heads(mesh, "mlp"),
    ),
    "forgets the other heads' step sizes": (
        *(heads, "read_by_all", lambda x, mesh: x if x.dim() == 1 else heads_read(x, mesh)),
        *("gradient of learnable_token_idx", lambda mesh: agrees_by_heads(mesh, Case("linear"))),
    ),
}
heads_read = heads.read_by_all


def every_own_mask(self, x):
    """The process's own mask, as if the others' were the same."""
    return x.tile(1, self.mesh.size() + 1)[:, : sum(self._lengths)]


SABOTEURS_OF_TOKENS = {
    "keeps the gradient of its own tokens": (
        *(sys.modules[__name__], "sum_gradients", lambda parameters, mesh: None, "gradient of"),
        lambda mesh: agrees_by_tokens(mesh, Case("video")),
    ),
    "counts positions from its first token": (
        *(SharedTokens, "own_tokens", lambda self, x: x[..., : self._lengths[self.mesh.get_local_rank()]]),
        *("y differs|gradient of x", lambda mesh: agrees_by_tokens(mesh, Case("mlp"))),
    ),
    "masks by its own mask": (
        *(SharedTokens, "all_tokens", every_own_mask, "y differs|gradient"),
        lambda mesh: agrees_by_tokens(mesh, Case("video", masked=True)),
    ),
    "reads backward within its own tokens": (
        *(SharedTokens, "_turned", lambda self, x, dim: x, "y differs"),
        lambda mesh: agrees_by_tokens(mesh, Case("video"), reverse=True),
    ),
    "keeps all tokens": (
        *(sys.modules[__name__], "own_tokens", lambda x, mesh, dim=1: x, "bytes are kept of"),
        keeps_its_own_tokens,
    ),
}


# --- what one group of processes checks ---


def checks():
    meshes = {size: dist.device_mesh.DeviceMesh("cpu", list(range(size))) for size in SIZES}
    found = {}

    def add(name, size, check):
        mesh = meshes[size]
        found[f"{name}, {size}"] = lambda: check(mesh) if dist.get_rank() < size else None

    for name in SETTINGS:  # the largest reads in float32, and has nothing masked
        add(f"heads {name} masked", 2, lambda mesh, name=name: agrees_by_heads(mesh, Case(name, masked=True)))
        add(f"heads {name} carried", 3, lambda mesh, name=name: agrees_by_heads(mesh, Case(name, carried=True)))
        add(f"heads {name} float32", 4, lambda mesh, name=name: agrees_by_heads(mesh, Case(name, torch.float32)))
    for name in ("linear", "mlp"):
        add(f"streams {name}", 3, lambda mesh, name=name: streams_by_heads(mesh, name))
    for name in SETTINGS:
        add(f"shows {name}", 2, lambda mesh, name=name: shows_by_heads(mesh, name))
    add("refuses", 2, refuses)
    add("refuses", 4, refuses)
    add("reads angles of heads", 2, reads_angles_of_heads)
    for how in ("heads", "tokens"):
        add(f"hands over {how} linear", 2, lambda mesh, how=how: hands_over(mesh, "linear", how))
        add(f"hands over {how} video", 3, lambda mesh, how=how: hands_over(mesh, "video", how))
    for name, wrong in (SABOTEURS | SABOTEURS_OF_TOKENS).items():
        add(f"saboteur {name}", 2, lambda mesh, wrong=wrong: caught(mesh, *wrong))
    for name in SETTINGS:
        add(f"tokens {name}", 2, lambda mesh, name=name: agrees_by_tokens(mesh, Case(name)))
        add(f"tokens {name} masked", 3, lambda mesh, name=name: agrees_by_tokens(mesh, Case(name, masked=True)))
        add(f"tokens {name} carried", 2, lambda mesh, name=name: agrees_by_tokens(mesh, Case(name, carried=True)))
        add(f"tokens {name} float32", 4, lambda mesh, name=name: agrees_by_tokens(mesh, Case(name, torch.float32)))
        add(f"shows tokens {name}", 3, lambda mesh, name=name: shows_by_tokens(mesh, name))
        masked = name != "mlp"
        add(
            f"tokens {name} backward",
            3,
            lambda mesh, name=name, masked=masked: agrees_by_tokens(mesh, Case(name, masked=masked), reverse=True),
        )
    add("tokens told", 2, lambda mesh: agrees_by_tokens(mesh, Case("mlp"), sizes=[9, 2]))
    add("refuses tokens", 2, refuses_tokens)
    add("keeps", 2, keeps_its_own_tokens)
    add("keeps", 4, keeps_its_own_tokens)
    return found


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    return ranks.reports("test_parallel_heads", "checks", max(SIZES), tmp_path_factory.mktemp("group"))


def require(reported, *kinds):
    """Every check of these kinds was made, in every process, and found nothing wrong."""
    made = {name: text for name, text in reported.items() if name.startswith(kinds)}
    wrong = [f"{name}: {text}" for name, text in made.items() if text]
    assert made
    assert not wrong, "\n".join(wrong)


def test_a_layer_of_some_heads_in_each_process_is_the_whole_layer(reported):
    require(reported, "heads ", "reads ")


def test_a_layer_of_some_tokens_in_each_process_is_the_whole_layer(reported):
    require(reported, "tokens ", "shows tokens ")


def test_blocks_keep_bytes_of_their_own_tokens(reported):
    require(reported, "keeps")


def test_collectives_get_what_the_closed_forms_say(reported):
    require(reported, "hands over")


def test_what_is_handed_over_is_sent_in_parts():
    handed = Handed(summed=400, gathered=100, exchanged=400)
    assert handed.total == 900
    assert [handed.sent(processes) for processes in (1, 2, 4)] == [0, 700, 1200]
    assert handed * 2 + handed == handed * 3


def test_it_streams_and_shows_what_the_whole_layer_does(reported):
    require(reported, "streams ", "shows ")


def test_heads_that_cannot_be_shared_out_are_refused(reported):
    require(reported, "refuses")


def test_what_is_shared_out_wrongly_is_caught(reported):
    require(reported, "saboteur ")
