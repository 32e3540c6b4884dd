"""`train.compile`: compiles the TTT layers of a run with `torch.compile`.

Only the part of `TTTLayer.forward` between its checks and its result is compiled, so hooks, names, states and
checkpoints around a layer are not affected. Two things avoid known defects of PyTorch when compiling meets activation
checkpoints and autocast:

- Sizes are constants of the compiled code (`dynamic=False`). If sizes were variables, two compiled versions could fit
  one call. A recomputation could then take another version than its forward pass, and a checkpoint refuses that, since
  it saves other tensors (github.com/pytorch/pytorch, issue 166926, open in PyTorch 2.13).
- Autocast is off around it. A compiled backward runs in the types that autocast chose when its forward was compiled,
  even if backward itself runs outside of autocast (issues 153044 and 179804).
"""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from ttt.errors import EnvironmentProblem, PluginError
from ttt.inject import Injection
from ttt.layer import Rotary, TTTLayer
from ttt.machine import missing_compiler, wrong_implementation
from ttt.ops.minibatch import Stream
from ttt.state import TTTState

BACKEND = "inductor"
"""The backend of `torch.compile`; the tests set one that needs no compiler."""
MOST_VERSIONS: Final = 8
"""The most versions that one run compiles, each for other sizes: PyTorch's limit, `recompile_limit`."""


class CompiledRead:
    """`TTTLayer._read` for the layers of one run, compiled once for each kind of input.

    Layers of the same shape share a compiled version. Inputs of another size, such as an evaluation's last batch, get
    their own version, up to `MOST_VERSIONS`; further sizes run uncompiled.
    """

    def __init__(self) -> None:
        # PyTorch caches compiled versions and counts them by code object, so each run makes its own code object.
        own = types.FunctionType(TTTLayer._read.__code__.replace(), TTTLayer._read.__globals__, TTTLayer._read.__name__)
        self._compiled: Callable[..., tuple[Tensor, Stream]] = torch.compile(
            own, fullgraph=True, dynamic=False, backend=BACKEND
        )
        self._versions: set[Hashable] = set()

    @property
    def versions(self) -> int:
        """How many kinds of input have a compiled version."""
        return len(self._versions)

    def __call__(
        self,
        layer: TTTLayer,
        x: Tensor,
        state: TTTState,
        rotary: Rotary | None,
        mask: Tensor | None,
        group_size: int,
    ) -> tuple[Tensor, Stream]:
        """`layer._read(x, state, rotary, mask, group_size)`, compiled if its kind of input has a version."""
        given = (x, *state.tensors().values(), *(rotary or ()), *(() if mask is None else (mask,)))
        kind = _kind(layer, given, group_size)
        # Kinds are only added, never removed, so a recomputation decides as its forward pass did.
        if kind not in self._versions:
            if len(self._versions) == MOST_VERSIONS:
                return layer._read(x, state, rotary, mask, group_size)
            self._versions.add(kind)
        return self._compiled(layer, x, state, rotary, mask, group_size)


def _kind(layer: TTTLayer, inputs: Iterable[Tensor], group_size: int) -> Hashable:
    """The kind of input that a version is compiled for: everything that PyTorch's guards check."""
    tensors = itertools.chain(inputs, layer.parameters())
    facts = tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)
    return facts, group_size, layer.precision, layer.config, layer.num_heads, layer.training, torch.is_grad_enabled()


def compile_layers(injection: Injection, device: torch.device) -> None:
    """Compile the TTT layers of every adapter, when they are first called.

    Args:
        injection: what `ttt.inject.apply` returned.
        device: where the layers are.

    Raises:
        EnvironmentProblem: there is no compiler for the device, PyTorch is too old, or `TTT_OPS` names an
            implementation that cannot be compiled.
    """
    obstacle = wrong_implementation() or missing_compiler(device.type)
    if obstacle is not None:
        raise EnvironmentProblem(f"train.compile: true, but {obstacle.problem}; {obstacle.fix}")
    read = CompiledRead()
    for adapter in injection.adapters.values():
        for module in adapter.modules():
            if isinstance(module, TTTLayer):
                module.compiled = read


@contextlib.contextmanager
def compile_errors(wanted: bool) -> Iterator[None]:
    """Turn a failed compilation, in forward or backward, into a sentence; does nothing if `wanted` is false."""
    if not wanted:
        yield
        return
    try:
        yield
    except Exception as raised:
        # the layers run inside the plugin's `loss`, so their errors arrive as errors of the plugin
        error = raised.__cause__ if isinstance(raised, PluginError) else raised
        if not isinstance(error, _failures()):
            raise
        raise EnvironmentProblem(
            f"train.compile: true: the TTT layers cannot be compiled here ({_cause(error)}); write train.compile: "
            f"false, or run `ttt doctor`"
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, CppCompileError, InvalidCxxCompiler


def _cause(error: BaseException) -> str:
    """The first line with text of the error that was raised first."""
    inner: Any = getattr(error, "inner_exception", None) or error
    lines = (line.strip() for line in str(inner).splitlines())
    return f"{type(inner).__name__}: {next(filter(None, lines), '')}".rstrip(": ")
