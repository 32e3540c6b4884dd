"""The scan: any group, any nesting, the same numbers; and memory that shrinks as it says."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ttt

LENGTH = 7
GROUPS = [0, 1, 2, 3, 6, 7, 8, 100]


def step(carry, x, scale, shift):
    h, count = carry
    h = torch.tanh(h @ scale + x["a"] * shift) + x["b"].unsqueeze(-1)
    return (h, count + 1), {"sum": h.sum(-1), "h": h}


def inputs(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype, requires_grad=True)

    carry = (draw(2, 3), torch.zeros((), dtype=torch.long))
    xs = {"a": draw(LENGTH, 2, 3), "b": draw(LENGTH, 2)}
    return carry, xs, (draw(3, 3), draw(3))


def leaves(carry, xs, consts):
    return [carry[0], xs["a"], xs["b"], *consts]


def loss_of(carry, xs, consts, group_size):
    (h, count), ys = ttt.scan(step, carry, xs, consts=consts, group_size=group_size)
    assert count.item() == LENGTH
    weights = torch.linspace(0.5, 1.5, LENGTH, dtype=h.dtype)
    return (h**2).sum() + (ys["sum"] * weights[:, None]).sum() + (ys["h"] ** 3).sum()


def by_hand(carry, xs, consts):
    (h, _), total = carry, torch.zeros((), dtype=torch.float64)
    for i in range(LENGTH):
        h = torch.tanh(h @ consts[0] + xs["a"][i] * consts[1]) + xs["b"][i].unsqueeze(-1)
        total = total + h.sum() * (0.5 + i / (LENGTH - 1)) + (h**3).sum()
    return total + (h**2).sum()


@pytest.mark.parametrize("group_size", GROUPS)
def test_value_and_gradients_are_those_of_a_loop(group_size):
    case = inputs()
    expected = by_hand(*case)
    expected_gradients = torch.autograd.grad(expected, leaves(*case))
    got = loss_of(*case, group_size)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, leaves(*case)), expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("group_size", [0, 1, 3, 7])
def test_gradcheck(group_size):
    case = inputs(seed=3)

    def function(h, a, b, scale, shift):
        (h, _), ys = ttt.scan(step, (h, case[0][1]), {"a": a, "b": b}, consts=(scale, shift), group_size=group_size)
        return h, ys["sum"], ys["h"]

    assert torch.autograd.gradcheck(function, leaves(*case))


@pytest.mark.parametrize("group_size", [0, 2])
@pytest.mark.parametrize("missing", ["carry", "y", "inputs"])
def test_partial_gradients(group_size, missing):
    """Outputs that nobody uses and inputs that need no gradient change nothing for the rest."""
    carry, xs, consts = inputs(seed=5)
    if missing == "inputs":
        xs = {name: x.detach() for name, x in xs.items()}
        consts = (consts[0].detach(), consts[1])

    def run(g):
        (h, _), ys = ttt.scan(step, carry, xs, consts=consts, group_size=g)
        loss = ys["h"].square().sum() if missing == "carry" else h.square().sum()
        wanted = [x for x in leaves(carry, xs, consts) if x.requires_grad]
        return torch.autograd.grad(loss, wanted)

    for a, b in zip(run(group_size), run(0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_is_kept_without_grad():
    case = inputs()
    with torch.no_grad():
        (h, _), ys = ttt.scan(step, case[0], case[1], consts=case[2], group_size=2)
    assert not h.requires_grad
    assert not ys["h"].requires_grad


def test_a_carry_that_is_handed_through():
    """A step may return the carry as it got it."""
    h = torch.randn(3, dtype=torch.float64, requires_grad=True)
    xs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    final, ys = ttt.scan(lambda c, x: (c, c * x), h, xs, group_size=2)
    (final.sum() + ys.sum()).backward()
    torch.testing.assert_close(h.grad, 1 + xs.detach().sum(0))
    torch.testing.assert_close(xs.grad, h.detach().expand(5, 3))


@pytest.mark.parametrize(
    "closed_over", [lambda: torch.ones(3, requires_grad=True), lambda: torch.ones(3, requires_grad=True) * 2]
)
def test_a_closure_that_would_lose_its_gradient_is_refused(closed_over):
    hidden = closed_over()
    h = torch.randn(3, requires_grad=True)
    xs = torch.randn(4, 3)
    final, _ = ttt.scan(lambda c, x: (c * hidden + x, c), h, xs, group_size=2)
    with pytest.raises(RuntimeError, match=r"Pass it in consts"):
        final.sum().backward()


def test_a_closure_alone_keeps_its_gradient():
    """Where no argument needs a gradient there is nothing to save, and autograd sees the closure itself."""
    hidden = torch.full((3,), 2.0, requires_grad=True)
    final, _ = ttt.scan(lambda c, x: (c * hidden + x, c), torch.ones(3), torch.ones(2, 3), group_size=1)
    final.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.full((3,), 5.0))  # d(h(h+1)+1)/dh = 2h + 1


def test_bad_calls_say_what_is_wrong():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="same leading axis"):
        ttt.scan(lambda c, x: (c, x), x[0], (x, x[:2]))
    with pytest.raises(ValueError, match="1 or more"):
        ttt.scan(lambda c, x: (c, x), x[0], x[:0])
    with pytest.raises(ValueError, match="group_size is -1"):
        ttt.scan(lambda c, x: (c, x), x[0], x, group_size=-1)
    with pytest.raises(ValueError, match="keeps its shape"):
        ttt.scan(lambda c, x: (c[:1], x), x[0], x)
    with pytest.raises(ValueError, match="another structure"):
        ttt.scan(lambda c, x: ((c, c), x), x[0], x)
    with pytest.raises(TypeError, match=r"carry holds a int.*torch.tensor"):
        ttt.scan(lambda c, x: (c, x), 0, x)
    with pytest.raises(TypeError, match=r"consts is a Tensor; write a tuple"):
        ttt.scan(lambda c, x, *k: (c, x), x[0], x, consts=x)
    with pytest.raises(TypeError, match=r"step returns a pair \(carry, y\), not a Tensor"):
        ttt.scan(lambda c, x: c * x, x[0], x)  # two elements, which would unpack


@pytest.mark.parametrize("group_size", [0, 2])
def test_a_y_that_changes_its_form_is_refused(group_size):
    """Groups write into one tensor, where a smaller y would be broadcast without a word."""
    carry = (torch.ones(3, requires_grad=True), torch.tensor(0))

    def change(late):
        def body(c, x):
            return (c[0] * x, c[1] + 1), c[0] if int(c[1]) < 2 else late(c[0])

        with pytest.raises(ValueError, match="y of another structure, shape or type"):
            ttt.scan(body, carry, torch.ones(4, 3), group_size=group_size)

    change(lambda y: y[:1])
    change(lambda y: y.double())
    change(lambda y: (y, y))


@pytest.mark.parametrize("group_size", [0, 2])
def test_none_stands_for_nothing(group_size):
    """`return carry, None`, as with `jax.lax.scan`."""
    h = torch.randn(3, dtype=torch.float64, requires_grad=True)
    xs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def body(c, x, factors):
        assert c["gone"] is None
        assert factors[1] is None
        return {"h": c["h"] * factors[0] + x[0], "gone": None}, None

    final, ys = ttt.scan(body, {"h": h, "gone": None}, (xs, None), consts=((scale, None),), group_size=group_size)
    assert ys is None
    assert final["gone"] is None
    expected = h
    for x in xs:
        expected = expected * scale + x
    got = torch.autograd.grad(final["h"].square().sum(), (h, xs, scale))
    for a, b in zip(got, torch.autograd.grad(expected.square().sum(), (h, xs, scale)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("what", ["carry", "x", "const"])
def test_writing_to_an_argument_is_refused(what):
    """Recomputed from what was overwritten, the gradients of `scale` would be wrong without a word."""
    scale = torch.full((3,), 2.0, requires_grad=True)

    def body(c, x, scale, shift):
        {"carry": c, "x": x, "const": shift}[what].mul_(2)
        return c + x + shift, c * scale * x

    with pytest.raises(ValueError, match="wrote to one of its arguments in place"):
        ttt.scan(body, torch.ones(3), torch.ones(4, 3), consts=(scale, torch.ones(3)), group_size=2)


def test_a_view_of_an_input_comes_back_as_an_output_of_its_own():
    """What a step hands through may be written to by the caller."""
    xs = torch.randn(4, 3, requires_grad=True)
    scale = torch.ones(3, requires_grad=True)
    final, ys = ttt.scan(lambda c, x, scale: (x, c * scale), torch.ones(3), xs, consts=(scale,), group_size=2)
    before = xs.detach().clone()
    final.add_(1)
    assert torch.equal(xs, before)
    (final.sum() + ys.sum()).backward()
    torch.testing.assert_close(xs.grad, torch.ones(4, 3))


def test_groups_on_the_meta_device():
    """`meta` has no autocast whose state could be kept."""
    h = torch.ones(3, device="meta", requires_grad=True)
    final, _ = ttt.scan(lambda c, x: (c * x, c), h, torch.ones(4, 3, device="meta"), group_size=2)
    final.sum().backward()
    assert h.grad is not None
    assert h.grad.shape == (3,)


def test_gradient_of_gradient_is_refused_in_groups_and_given_without():
    case = inputs()
    first = torch.autograd.grad(loss_of(*case, 0), case[0][0], create_graph=True)[0]
    first.sum().backward()
    # At once: asked for inputs' gradients alone, autograd would leave an error of the second pass out.
    with pytest.raises(RuntimeError, match="no second derivative; write group_size=0"):
        torch.autograd.grad(loss_of(*case, 2), case[0][0], create_graph=True)


def held_bytes(group_size: int, length: int, width: int) -> int:
    """Bytes that autograd holds between forward and backward, beyond the inputs: storages its hooks see."""
    seen: dict[int, int] = {}
    carry = torch.randn(width, width, requires_grad=True)
    xs = torch.randn(length, width, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def body(c, x):
        c = torch.tanh(c + x)
        return c, c.sum(-1)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _, ys = ttt.scan(body, carry, xs, group_size=group_size)
        loss = ys.sum()
    for x in (carry, xs):
        seen.pop(x.untyped_storage().data_ptr(), None)
    del loss
    gc.collect()
    return sum(seen.values())


def test_memory_is_one_carry_for_each_group():
    width, length = 32, 24
    carry = width * width * 4
    assert held_bytes(1, length, width) == (length - 1) * carry
    assert held_bytes(4, length, width) == 5 * carry
    assert held_bytes(5, length, width) == 4 * carry
    assert held_bytes(0, length, width) > 0.9 * length * carry


def kyutai_checkpoint(function, *args):
    """Activation checkpointing as an autograd function of its own, as kyutai's `moshi.utils.compile` has it."""
    from moshi.utils.compile import Checkpoint

    return Checkpoint.apply(function, *args)


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def non_reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


NESTINGS = {
    "plain": [],
    "reentrant": [reentrant],
    "non-reentrant": [non_reentrant],
    "kyutai": [kyutai_checkpoint],
    "non-reentrant twice": [non_reentrant, non_reentrant],
    "reentrant in non-reentrant": [non_reentrant, reentrant],
    "non-reentrant in kyutai": [kyutai_checkpoint, non_reentrant],
    "non-reentrant in reentrant": [reentrant, non_reentrant],
}


@pytest.mark.parametrize("nesting", NESTINGS, ids=str)
@pytest.mark.parametrize("group_size", [0, 1, 3, 16])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_no_nesting_changes_a_gradient(nesting, group_size, autocast):
    """Law 2, for the scan alone."""

    def run(wrappers, g):
        case = inputs(torch.float32, seed=11)
        wanted = leaves(*case)

        def function(h, a, b, scale, shift):
            (h, _), ys = ttt.scan(step, (h, case[0][1]), {"a": a, "b": b}, consts=(scale, shift), group_size=g)
            return h.square().sum() + ys["h"].sum() * 0.1

        for wrap in reversed(wrappers):
            function = functools.partial(wrap, function)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(*wanted)
            if kyutai_checkpoint in wrappers:
                loss.backward()  # kyutai's recomputes under the autocast state of the moment, and keeps none itself
        if kyutai_checkpoint not in wrappers:
            loss.backward()
        return loss.detach(), [x.grad for x in wanted]

    loss, gradients = run(NESTINGS[nesting], group_size)
    same_group_loss, same_group = run([], group_size)
    torch.testing.assert_close(loss, same_group_loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, same_group, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # Between groups autocast differs by rounding: a loop sums the gradients of its bfloat16 copy of a constant in
    # bfloat16, groups sum them in float32.
    tolerance = 2e-2 if autocast else 1e-6
    ungrouped_loss, ungrouped = run([], 0)
    torch.testing.assert_close(loss, ungrouped_loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, ungrouped, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
