"""Compiles kernels for GPUs that are not there, and reads what they would take of one.

    python benchmarks/kernels_compiled.py < work.jsonl > found.jsonl      # what `compiled` starts

A line of work is `{"package": …, "form": …, "arch": …}`. Triton compiles it and ptxas, which comes with Triton, says
how many registers a thread takes and how many bytes it spills. `benchmarks/kernels.py --compile` makes the table.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

ARCHITECTURES = (80, 90, 100)
"""A100, H100 and H200, B200."""
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that a block may take (CUDA C++ Programming Guide, "Compute Capabilities")."""
TENSOR_MEMORY_COLUMNS = 512
"""Tensor memory of a multiprocessor of sm_100."""


@dataclass(frozen=True)
class Compiled:
    """One form on one architecture."""

    form: str
    arch: int
    fingerprint: str
    num_warps: int
    num_stages: int
    registers: int = 0
    spilled_bytes: int = 0
    """A thread's, the larger of stores and loads."""
    stated_bytes: int = 0
    """What the form says that it may spill."""
    stack_bytes: int = 0
    """A thread's local memory: what spills, and arrays whose index is not known."""
    shared_bytes: int = 0
    tensor_memory: int = 0
    """Columns of sm_100's tensor memory."""
    seconds: float = 0.0
    """To compile it."""
    turned: bool = False
    """Whether a dot's result is transposed."""
    error: str | None = None
    """Why it does not compile, in one line."""

    def faults(self) -> Iterator[str]:
        """What forbids to ship it."""
        if self.error is not None:
            yield f"does not compile: {self.error}"
        if self.spilled_bytes > self.stated_bytes:
            yield f"spills {self.spilled_bytes} bytes a thread, and states {self.stated_bytes}"
        if self.shared_bytes > SHARED_BYTES[self.arch]:
            yield f"takes {self.shared_bytes} bytes of shared memory of {SHARED_BYTES[self.arch]}"
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            yield f"takes {self.tensor_memory} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}"
        if self.turned:
            yield "transposes a dot's result, which has been miscompiled on Hopper"


def compiled(
    work: Sequence[tuple[str, str, int]], *, processes: int = 2, tell: Callable[[Compiled], None] = lambda one: None
) -> list[Compiled]:
    """Compile forms in processes of their own, since this one may have Triton's interpreter.

    Args:
        work: package, name of the form, and architecture (90 is sm_90).
        processes: at a time.
        tell: is given each as it comes.
    """
    with ThreadPoolExecutor(processes) as threads:
        parts = [part for i in range(processes) if (part := work[i::processes])]
        found = list(threads.map(lambda part: _in_a_process(part, tell), parts))
    order = {(form, arch): place for place, (_, form, arch) in enumerate(work)}
    return sorted((one for part in found for one in part), key=lambda one: order[one.form, one.arch])


def _in_a_process(work: Sequence[tuple[str, str, int]], tell: Callable[[Compiled], None]) -> list[Compiled]:
    """Compile one after the other; where the compiler ends the process, as its assertions do, go on in another."""
    found: list[Compiled] = []
    while len(found) < len(work):
        code = _until_it_ends(work[len(found) :], lambda one: (found.append(one), tell(one)))
        if code:
            found.append(_died(*work[len(found)], code))
            tell(found[-1])
    return found


def _until_it_ends(work: Sequence[tuple[str, str, int]], take: Callable[[Compiled], object]) -> int:
    lines = "\n".join(json.dumps({"package": p, "form": f, "arch": a}) for p, f, a in work)
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as asked:
        asked.write(lines)
        asked.seek(0)
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(
            [sys.executable, __file__], stdin=asked, stdout=subprocess.PIPE, env=environment, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                take(Compiled(**json.loads(line)))
    return process.returncode


def _died(package: str, name: str, arch: int, code: int) -> Compiled:
    from ttt.ops.triton.forms import fingerprint, shipped

    form = shipped(package)[name]
    error = f"the compiler ended its process with {code}"
    return Compiled(name, arch, fingerprint(form), form.num_warps, form.num_stages, error=error)


# --- in the process that compiles ---


def compile_form(form: Any, arch: int) -> Compiled:
    """Compile a form for an architecture, and read what it takes."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ttt.ops.triton.forms import fingerprint

    named = {"form": form.name, "arch": arch, "fingerprint": fingerprint(form)}
    named |= {"num_warps": form.num_warps, "num_stages": form.num_stages, "stated_bytes": form.may_spill(arch)}
    names = form.kernel.arg_names
    source = ASTSource(
        fn=form.kernel,
        signature={name: form.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in form.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in form.aligned},
    )
    options = {"num_warps": form.num_warps, "num_stages": form.num_stages}
    knobs.nvidia.dump_ptxas_log = True  # prints what ptxas says,
    knobs.compilation.always_compile = True  # which it does not of what is cached, be it under another name
    start = time.perf_counter()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # the compiler may raise anything; the table says what
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return Compiled(**named, seconds=time.perf_counter() - start, error=cause)
    log = said.getvalue()
    spilled = max(_number(r"(\d+) bytes spill stores", log), _number(r"(\d+) bytes spill loads", log))
    return Compiled(
        **named,
        registers=_number(r"Used (\d+) registers", log),
        spilled_bytes=spilled,
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        shared_bytes=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0) or 0,
        seconds=time.perf_counter() - start,
        turned=transposes_a_dot(kernel.asm["ttir"]),
    )


def _number(pattern: str, log: str) -> int:
    """The largest number that the pattern finds.

    Raises:
        RuntimeError: it finds none, so that nothing is known.
    """
    found = [int(number) for number in re.findall(pattern, log)]
    if not found:
        raise RuntimeError(f"ptxas did not say {pattern}; it said: {log}")
    return max(found)


def transposes_a_dot(ttir: str) -> bool:
    """Whether a `tl.trans` reads what a `tl.dot` made, be it through arithmetic, branches or loops.

    Values are followed by name: a value made of one that comes from a dot comes from it too, until it goes through
    memory or is reduced to fewer dimensions. Loops carry values to where they begin, so the search runs until it finds
    nothing new.
    """
    lines = _with_own_names([line for line in ttir.splitlines() if not line.lstrip().startswith("//")])
    made: set[str] = set()
    while True:
        before = len(made)
        regions: list[_Region] = []
        for line in lines:
            _follow(line, made, regions)
        if len(made) == before:
            break
    return any("tt.trans" in line and made & set(_NAMES.findall(line.split("=", 1)[-1])) for line in lines)


def _with_own_names(lines: Sequence[str]) -> list[str]:
    """The same with a name of its own for each value: the text gives those of one loop again to another's."""
    times: dict[str, int] = {}
    found = []
    for line in lines:
        results, equals, _ = line.partition(" = ")
        defined = set(re.findall(r"%\w+", results)) if equals else set()
        if "scf.for" in line or "scf.while" in line:
            defined |= set(re.findall(r"(%\w+) = ", line[line.index("scf.") :]))
        if line.lstrip().startswith("^"):
            defined |= set(re.findall(r"(%\w+):", line))
        for name in defined:
            times[name] = times.get(name, 0) + 1
        found.append(re.sub(r"%\w+", lambda name: f"{name.group()}_{times.get(name.group(), 0)}", line))
    return found


_NAMES = re.compile(r"%[\w]+(?:#\d+)?")
_ENDS = ("tt.reduce", "tt.load", "tt.store", "tt.descriptor")
"""Operations behind which a value is no longer what a dot left in registers."""


class _Region(NamedTuple):
    """What is between two braces: a loop's or a branch's code, a function's, or that of a `tt.reduce`."""

    results: list[str]
    """Of the loop or branch."""
    carries: list[str]
    """What a loop's code reads of the turn before."""


def _follow(line: str, made: set[str], regions: list[_Region]) -> None:
    """Add to `made` what this line makes of a dot's result; `regions` are those that it is in."""
    results, _, rest = line.partition(" = ") if " = " in line else ("", "", line)
    code, opens = rest.strip(), rest.rstrip().endswith("{")
    if "scf.for" in rest or "scf.while" in rest or "scf.if" in rest:
        name, _, count = results.strip().partition(":")
        out = [f"{name}#{i}" for i in range(int(count))] if count else [name] if name else []
        carried = re.search(r"(?:iter_args|scf\.while )\((.*?)\) (?:->|:)", rest)
        pairs = re.findall(r"(%\w+) = (%[\w#]+)", carried.group(1)) if carried else []
        made.update(inner for inner, given in pairs if given in made)
        regions.append(_Region(out, [inner for inner, _ in pairs]))
    elif code.startswith("}"):
        if not opens:  # else the same loop or branch goes on, as with `} else {`
            regions.pop()
    elif code.startswith("^") and regions:  # what a `scf.while` goes on with is what it ends with
        names = re.findall(r"(%\w+):", code)
        made.update(name for name, value in zip(names, regions[-1].results, strict=False) if value in made)
    elif "scf.condition" in rest:
        _, *given = _NAMES.findall(rest)
        made.update(name for name, value in zip(regions[-1].results, given, strict=True) if value in made)
    elif "scf.yield" in rest:
        given = _NAMES.findall(rest)
        for names in regions[-1]:
            made.update(name for name, value in zip(names, given, strict=False) if value in made)
    else:
        if opens:
            regions.append(_Region([], []))
        if results and ("tt.dot" in rest or (made & set(_NAMES.findall(rest)) and not any(e in rest for e in _ENDS))):
            made.update(_NAMES.findall(results))


def main() -> None:
    """Compile what is asked for, a line for each."""
    from ttt.ops.triton.forms import shipped

    forms: dict[str, dict[str, Any]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        package = asked["package"]
        if package not in forms:
            forms[package] = shipped(package)
        print(json.dumps(asdict(compile_form(forms[package][asked["form"]], asked["arch"]))), flush=True)


if __name__ == "__main__":
    main()
