"""Recorded calls of pure functions: what launches many kernels is launched as one CUDA graph where its shapes repeat.

A recorded call reads and writes memory of its own, always the same. So every use of a recording copies the arguments
in, replays, and copies the results out into new tensors: outside of this module it is a function like the one that was
recorded. What comes out is never written again, whoever keeps it for how long: a state, a tensor for a backward pass
that comes after other forward passes, a recomputation under a checkpoint, another layer of the same shapes. A gradient
that arrives anywhere, a parameter that has moved: all are copied in. The copies take little of what they save, since
only functions whose tensors are small are recorded; large ones are not bound by their launches.

Python does not run when a recording is replayed. So a function must read nothing but its arguments, wait for nothing,
and let nothing but shapes, types, strides and settings decide what it launches: these are the kind of a call, and each
kind has its recording. `ttt.ops.fused.registration` gives the two passes of its operations to `replayed`. They lie
below autograd: what is kept between them are tensors like any others.

How calls are recorded is a `Recorder`'s: `ttt.ops.cuda_graphs` has that of CUDA.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ttt.ops.constants import MOST_BYTES_OF_ONE, MOST_BYTES_RECORDED

Result = TypeVar("Result")

CALLS_BEFORE: Final = 2
"""So many calls of a kind run as they are before one is recorded: shapes that do not repeat are not worth it."""
MOST_RECORDINGS: Final = 32
"""The most kinds of calls that one run records. None is dropped for another: that would go on for ever."""
MOST_KINDS: Final = 256
"""The most kinds that are counted; calls of further kinds run as they are."""
_ALIGNED = 512
"""Bytes; PyTorch's allocator gives memory that begins at a multiple of it."""


class Recorder(Protocol):
    """Records what a function launches on a device."""

    def records(self, device: torch.device) -> bool:
        """Whether calls on this device can be recorded and replayed now."""
        ...

    def in_turn(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """A context for one use of a recording; what is launched in it runs after the uses before it."""
        ...

    def record(self, function: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[Replay, Sequence[Tensor]]:
        """Record what `function` launches.

        Returns:
            What launches the same again, on the same memory, and the function's results: tensors in that memory.

        Raises:
            UnusableDeviceError: it cannot be recorded, and now the device cannot be used either.
            Exception: it cannot be recorded, and all is as it was.
        """
        ...


Replay = Callable[[], object]


class UnusableDeviceError(RuntimeError):
    """A recording failed, and left a device on which nothing can be launched any more."""


class Replays:
    """The recordings of one run: which calls are recorded, and the memory of what was.

    Args:
        recorder: how they are recorded.
        tell: is told in one sentence if something cannot be recorded; the run goes on without recordings then.
        most_bytes_of_one: see `ttt.ops.constants.MOST_BYTES_OF_ONE`.
        most_bytes: see `ttt.ops.constants.MOST_BYTES_RECORDED`.
    """

    def __init__(
        self,
        recorder: Recorder,
        tell: Callable[[str], object],
        *,
        most_bytes_of_one: int = MOST_BYTES_OF_ONE,
        most_bytes: int = MOST_BYTES_RECORDED,
    ) -> None:
        self._recorder = recorder
        self._tell = tell
        self._most_bytes_of_one, self._most_bytes = most_bytes_of_one, most_bytes
        self._seen: dict[Hashable, _Seen] = {}
        self._recordings: dict[Hashable, _Recording] = {}
        self._inputs = _Inputs()
        self._failed = False
        self._recording = False
        self._lock = threading.RLock()  # on a GPU backward runs in another thread
        self.replayed = 0
        """How many calls were replayed."""

    @property
    def recorded(self) -> int:
        """How many kinds of calls have a recording."""
        return len(self._recordings)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory for arguments and results."""
        return self._inputs.nbytes + sum(recording.result_bytes for recording in self._recordings.values())

    def __call__(self, name: str, function: Callable[..., Result], arguments: Sequence[Any]) -> Result:
        """`function(*arguments)`, replayed if this kind of call is recorded.

        Args:
            name: of the function; calls of two functions are never of one kind.
            function: of tensors, sequences of tensors, and settings; returns a sequence of tensors and sequences of
                tensors. It writes to none of its arguments, and keeps none of its results.
            arguments: of the function.
        """
        tensors, form = _flat(arguments)
        device = tensors[0].device
        apart = any(x.device != device for x in tensors)
        if self._failed or self._recording or apart or not self._recorder.records(device):
            return function(*arguments)
        kind = (name, form, tuple(map(_kind, tensors)))
        with self._lock:
            recording = self._recordings.get(kind)
            if recording is None and self._is_due(kind):
                recording = self._record(kind, name, function, tensors, form)
            if recording is None:
                found = function(*arguments)
                self._count(kind, tensors, found)
                return found
            self.replayed += 1
            with self._recorder.in_turn(device), torch.no_grad():
                replayed: Any = recording(tensors)
            return replayed

    def _is_due(self, kind: Hashable) -> bool:
        """Whether a kind of call has repeated, and there is room for its recording."""
        seen = self._seen.get(kind)
        return (
            seen is not None
            and seen.calls >= CALLS_BEFORE
            and seen.nbytes <= self._most_bytes_of_one
            and self.nbytes + seen.nbytes <= self._most_bytes
            and len(self._recordings) < MOST_RECORDINGS
        )

    def _count(self, kind: Hashable, tensors: Sequence[Tensor], found: Any) -> None:
        seen = self._seen.get(kind)
        if seen is not None:
            self._seen[kind] = seen._replace(calls=seen.calls + 1)
        elif len(self._seen) < MOST_KINDS:
            self._seen[kind] = _Seen(1, sum(map(_extent, (*tensors, *_flat(found)[0]))))

    def _record(
        self, kind: Hashable, name: str, function: Callable[..., Any], tensors: Sequence[Tensor], form: _Form
    ) -> _Recording | None:
        """Record a kind of call; None if it cannot be."""
        self._recording = True
        try:
            # A tensor that is made in inference mode could not be written to outside of it.
            # In turn, since its arguments are copied into memory that recordings share.
            with self._recorder.in_turn(tensors[0].device), torch.inference_mode(False), torch.no_grad():
                made = _Recording.of(self._recorder, function, tensors, form, self._inputs)
        except UnusableDeviceError:
            self._failed = True
            raise
        except Exception as error:  # whatever a driver or a kernel raises: what runs without a recording goes on so
            self._fail(name, error)
            return None
        finally:
            self._recording = False
        self._recordings[kind] = made
        return made

    def _fail(self, name: str, error: Exception) -> None:
        """Go on without recordings, those that are there included: one rule is easier to look into than two."""
        self._failed = True
        self._recordings.clear()
        self._inputs = _Inputs()
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._tell(f"WARNING: {name} cannot be recorded as a CUDA graph ({cause}); the run goes on without CUDA graphs")


class _Seen(NamedTuple):
    """A kind of call that has no recording."""

    calls: int
    nbytes: int
    """Of its arguments and results."""


class _Recording:
    """One recorded kind of call.

    Args:
        inputs: the memory that it reads its arguments from.
        replay: launches it.
        results: the memory that it writes its results to.
        form: how the results make what the function returned.
    """

    def __init__(self, inputs: Sequence[Tensor], replay: Replay, results: Sequence[Tensor], form: _Form) -> None:
        self._inputs = [_memory(x) for x in inputs]
        self._replay = replay
        self._results = results
        self._memory_of_results = [_memory(x) for x in results]
        self._form = form
        # Results may be views of what the function made room for; that is kept then.
        rooms = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
        self.result_bytes = sum(rooms.values())

    @classmethod
    def of(
        cls,
        recorder: Recorder,
        function: Callable[..., Any],
        tensors: Sequence[Tensor],
        form: _Form,
        memory: _Inputs,
    ) -> _Recording:
        """Record a call with these arguments."""
        inputs = memory.like(tensors)
        for mine, theirs in zip(inputs, tensors, strict=True):
            _memory(mine).copy_(_memory(theirs))
        forms: list[_Form] = []

        def flat() -> list[Tensor]:
            results, of_results = _flat(function(*_formed(inputs, form)))
            forms.append(of_results)
            return results

        replay, results = recorder.record(flat, inputs[0].device)
        return cls(inputs, replay, results, forms[-1])

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """What the function returns for these arguments, in new memory with the same strides."""
        torch._foreach_copy_(self._inputs, [_memory(x) for x in tensors])
        self._replay()
        found = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in self._results]
        torch._foreach_copy_([_memory(x) for x in found], self._memory_of_results)
        return tuple(_formed(found, self._form))


class _Inputs:
    """Memory that recordings read their arguments from: all share it, since each copies its own in before it runs."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(memory.nbytes for memory in self._memory)

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the same shapes, strides and alignment as these, all in one piece of memory."""
        starts, end = [], 0
        for x in tensors:
            starts.append(end + x.data_ptr() % _ALIGNED)
            end = -(-(starts[-1] + _extent(x)) // _ALIGNED) * _ALIGNED
        memory = next((m for m in self._memory if m.nbytes >= end + _ALIGNED and m.device == tensors[0].device), None)
        if memory is None:  # what is recorded already keeps its addresses
            memory = torch.empty(end + _ALIGNED, dtype=torch.uint8, device=tensors[0].device)
            self._memory.append(memory)
        first = -memory.data_ptr() % _ALIGNED
        return [
            torch.as_strided(memory[first + start : first + start + _extent(x)].view(x.dtype), x.shape, x.stride())
            for start, x in zip(starts, tensors, strict=True)
        ]


_Form = tuple[Any, ...]
"""What the entries of a sequence are: for tensors and sequences of tensors their number, for anything else itself."""


def _flat(values: Sequence[Any]) -> tuple[list[Tensor], _Form]:
    """All tensors in order, and the form in which they came."""
    tensors: list[Tensor] = []
    form: list[tuple[str, Any]] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            form.append(("tensor", 1))
        elif isinstance(value, list | tuple):
            tensors.extend(value)
            form.append(("list", len(value)))
        else:
            form.append(("setting", value))
    return tensors, tuple(form)


def _formed(tensors: Sequence[Tensor], form: _Form) -> list[Any]:
    """The inverse of `_flat`."""
    left = iter(tensors)
    return [
        value if what == "setting" else next(left) if what == "tensor" else [next(left) for _ in range(value)]
        for what, value in form
    ]


def _kind(x: Tensor) -> Hashable:
    """What of a tensor may decide what is launched: kernels are chosen by how memory is aligned too."""
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


def _extent(x: Tensor) -> int:
    """Bytes from its first number to the end of its last, which it may have only once (`expand`)."""
    if x.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _memory(x: Tensor) -> Tensor:
    """All numbers in its memory from its first to its last, in one row: such rows are copied in one launch for all.

    Gaps between rows of a slice are copied along. Numbers that `expand` repeats are there once.
    """
    return torch.as_strided(x, (_extent(x) // x.element_size(),), (1,))


# --- the recordings of this process ---

_active: Replays | None = None
"""Of the whole process, not of a thread: on a GPU, PyTorch runs backward in a thread of its own."""


@contextlib.contextmanager
def replaying(replays: Replays | None) -> Iterator[None]:
    """A context in which calls through `replayed` are recorded and replayed; None: in which none is."""
    global _active
    before, _active = _active, replays
    try:
        yield
    finally:
        _active = before


def replayed(name: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`, by `Replays` where `replaying` says so."""
    return function(*arguments) if _active is None else _active(name, function, arguments)
