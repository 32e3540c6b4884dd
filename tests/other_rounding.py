"""Another maker's arithmetic, imitated: how a product or a sum is rounded depends on its shape.

A matrix product of another shape is computed in another order, so its rounding differs; which shapes differ depends on
the processor and its library. `TTT_OTHER_ROUNDING=1` (see `conftest.py`) makes all of them differ: terms are added up
in an order drawn from the shape, and what has no order to choose is moved by at most a unit in the last place. The
same operation on the same shapes still gives the same bits, and what is exact everywhere, as products of small whole
numbers are, stays exact. So a test that asks for equal bits across shapes fails here, whatever the machine.

The CPU's own kernels are replaced: backward, other threads and compiled code meet it too.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

Kernel = Callable[..., Any]
_KERNELS = vars(library)["Library"]("aten", "IMPL")
_PRODUCTS = {
    # operator: places of the left factor and the right one
    (0, 1): ("mm", "bmm", "mv", "dot"),
    (1, 2): ("addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "addmv_"),
}
_CONVOLUTIONS = ("mkldnn_convolution", "_slow_conv2d_forward", "slow_conv3d_forward")
_SUMS = ("sum.dim_IntList", "sum.IntList_out", "mean.dim", "mean.out", "var.correction", "var.correction_out")
_FUNCTIONS = (
    *("exp", "exp_", "tanh", "tanh_", "sigmoid", "sigmoid_", "gelu", "silu", "silu_", "cos", "sin"),
    *("linalg_vector_norm",),
    *("_softmax", "_log_softmax", "native_layer_norm", "native_layer_norm_backward", "native_group_norm"),
    *("gelu_backward", "silu_backward", "convolution_backward", "_scaled_dot_product_flash_attention_for_cpu"),
)  # fmt: skip
_PERIOD = 8191
"""Of the noise; a prime, so that the rows of a batch meet different stretches of it."""


def install() -> None:
    """Replace the kernels, for the rest of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says once that a kernel is replaced
        for (left, right), names in _PRODUCTS.items():
            for name in (*names, *(f"{name}.out" for name in names)):
                _replace(name, functools.partial(_product, left, right))
        for name in _CONVOLUTIONS:
            _replace(name, _convolution)
        for name in _SUMS:
            _replace(name, _sum)
        for name in (*_FUNCTIONS, *(f"{name}.out" for name in _FUNCTIONS)):
            _replace(name, _function)


def _replace(name: str, imitation: Callable[..., Any]) -> None:
    """Call `imitation(kernel, …)` instead of the CPU's own kernel, where there is one."""
    operator = f"aten::{name}"
    if not torch._C._dispatch_has_kernel(operator):
        return
    own = torch._C._dispatch_has_kernel_for_dispatch_key
    if not own(operator, "CPU") and not own(operator, "CompositeExplicitAutograd"):
        return  # composed of others, which are replaced
    kernel = library.get_kernel(operator, "CPU")

    def run(keys: Any, *args: Any, **keywords: Any) -> Any:
        return imitation(functools.partial(kernel.call_boxed, keys), *args, **keywords)

    _KERNELS.impl(name, run, "CPU", with_keyset=True)


def _generator(shape: Sequence[int]) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(tuple(shape)).encode()))


@functools.lru_cache(maxsize=4096)
def _order(count: int, *shape: int) -> Tensor:
    """The order in which `count` terms are added up."""
    return torch.randperm(count, generator=_generator((count, *shape)))


@functools.lru_cache(maxsize=512)
def _noise(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A unit in the last place more or less, or nothing."""
    count = torch.Size(shape).numel()
    some = torch.randint(-1, 2, (_PERIOD,), generator=_generator(shape)).to(dtype) * (torch.finfo(dtype).eps / 2)
    return some.repeat(count // _PERIOD + 1)[:count].view(shape)


def _product(left: int, right: int, kernel: Kernel, *args: Any, **keywords: Any) -> Any:
    a, b = args[left], args[right]
    if a.shape[-1] > 1 and a.dtype.is_floating_point:
        order = _order(a.shape[-1], *a.shape, *b.shape)
        a, b = a.index_select(-1, order), b.index_select(max(b.dim() - 2, 0), order)
        args = (*args[:left], a, *args[left + 1 : right], b, *args[right + 1 :])
    return kernel(*args, **keywords)


def _convolution(kernel: Kernel, x: Tensor, weight: Tensor, *args: Any, **keywords: Any) -> Any:
    if weight.shape[1] > 1 and x.shape[1] == weight.shape[1]:  # in one group
        order = _order(x.shape[1], *x.shape, *weight.shape)
        x, weight = x.index_select(1, order), weight.index_select(1, order)
        return kernel(x, weight, *args, **keywords)
    return _function(kernel, x, weight, *args, **keywords)


def _sum(kernel: Kernel, x: Tensor, dims: Any = None, *args: Any, **keywords: Any) -> Any:
    summed = x
    if x.dtype.is_floating_point:
        for dim in dims or range(x.dim()):
            summed = summed.index_select(dim, _order(x.shape[dim], *x.shape))
    return kernel(summed, dims, *args, **keywords)


def _function(kernel: Kernel, *args: Any, **keywords: Any) -> Any:
    found = kernel(*args, **keywords)
    for x in found if isinstance(found, tuple) else (found,):
        if isinstance(x, Tensor) and x.dtype.is_floating_point and x.dim():
            # What is a whole number or a half, as e⁰ and σ(0) are, is exact everywhere.
            x.add_(torch.where((2 * x).frac() == 0, 0, x) * _noise(x.shape, x.dtype))
    return found
