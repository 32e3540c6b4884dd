"""What can be known of kernels without a GPU: they compile, fit, spill no more than they say, and each has a form."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import json
import os
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

os.environ.setdefault("TRITON_INTERPRET", "1")

import planted_kernels.planted as planted
from kernels_compared import Case, Problem, runs
from kernels_compiled import ARCHITECTURES, Compiled, compiled, transposes_a_dot
from kernels_launched import launches

from ttt.ops.triton.forms import PACKAGE, Form, fingerprint, parts, shipped
from ttt.ops.triton.mlp_run import SHIPPED

ROOT = Path(__file__).parent.parent
TABLE = json.loads((ROOT / "benchmarks" / "results" / "kernels-compiled.json").read_text())


def _faults(found: list[Compiled]) -> list[str]:
    return [f"{one.form}, sm_{one.arch}: {fault}" for one in found for fault in one.faults()]


# --- the gate ---


def test_the_gate_catches_each_fault_and_nothing_else() -> None:
    names = ("sound", "spilling", "hoarding", "turning", "deadly", "broken")
    found = {one.form: one for one in compiled([("planted_kernels", name, 90) for name in names])}
    said = {name: " and ".join(found[name].faults()) for name in names}
    assert said["sound"] == ""
    assert not list(replace(found["spilling"], stated_bytes=1 << 16).faults())
    assert re.fullmatch(r"spills \d+ bytes a thread, and states 0", said["spilling"])
    assert re.fullmatch(r"takes 262144 bytes of shared memory of 232448", said["hoarding"])
    assert re.fullmatch(r"transposes a dot's result, .*", said["turning"])
    assert re.fullmatch(r"does not compile: CompilationError.*incompatible dimensions.*", said["broken"])
    assert said["deadly"] == "does not compile: the compiler ended its process with -6"
    sound = found["sound"]
    assert 16 <= sound.registers <= 255
    assert sound.shared_bytes == 2 * 4 * 32 * 32  # a tile of each operand


TRANSPOSES = """
  %a = tt.dot %x, %y, %zero : tensor<32x32xf32>
  %loop:2 = scf.for %i = %lo to %hi step %one iter_args(%carried = %zero, %other = %x) -> (T, T)  : i32 {
    %scaled = arith.mulf %carried, %half : tensor<32x32xf32>
    %sum = arith.addf %scaled, CARRIED : tensor<32x32xf32>
    scf.yield %sum, %other : tensor<32x32xf32>, tensor<32x32xf32>
  }
  %turned = tt.trans RESULT {order = array<i32: 1, 0>} : tensor<32x32xf32> -> tensor<32x32xf32>
"""


@pytest.mark.parametrize(
    ("carried", "result", "wrong"),
    [
        ("%a", "%a", True),
        ("%a", "%x", False),
        ("%a", "%loop#0", True),
        ("%a", "%loop#1", False),
        ("%x", "%loop#0", False),
        ("%x", "%scaled", False),
        ("%a", "%scaled", True),  # the loop's second turn reads what its first made
    ],
)
def test_a_dots_result_is_followed_to_where_it_is_transposed(carried: str, result: str, wrong: bool) -> None:
    assert transposes_a_dot(TRANSPOSES.replace("CARRIED", carried).replace("RESULT", result)) is wrong


SIBLINGS = """
  scf.for %i = %lo to %hi step %one  : i32 {
    %x_1 = tt.load %at : tensor<32x32x!tt.ptr<f32>>
    %x_2 = tt.trans TURNED {order = array<i32: 1, 0>} : tensor<32x32xf32> -> tensor<32x32xf32>
    %x_3 = tt.dot %x_1, %x_2, %zero : tensor<32x32xf32>
  }
  scf.for %i = %lo to %hi step %one  : i32 {
    %x_1 = tt.dot %a, %b, %zero : tensor<32x32xf32>
    %x_2 = tt.load %at : tensor<32x32x!tt.ptr<f32>>
    %x_3 = tt.trans THERE {order = array<i32: 1, 0>} : tensor<32x32xf32> -> tensor<32x32xf32>
  }
"""


@pytest.mark.parametrize(("there", "wrong"), [("%x_1", True), ("%x_2", False)])
def test_loops_that_share_names_are_told_apart(there: str, wrong: bool) -> None:
    """What is a dot's result in one of them is another's load."""
    assert transposes_a_dot(SIBLINGS.replace("TURNED", "%x_1").replace("THERE", there)) is wrong


SUMS = """
  %loop:2 = scf.for %i = %lo to %hi step %one iter_args(%carried = %zero, %other = %x) -> (T, T)  : i32 {
    %sums = "tt.reduce"(%carried) <{axis = 1 : i32}> ({
    ^bb0(%one_of_them: f32, %another: f32):
      %both = arith.addf %one_of_them, %another : f32
      tt.reduce.return %both : f32
    }) : (tensor<32x32xf32>) -> tensor<32xf32>
    %wide = tt.broadcast %sums : tensor<32x1xf32> -> tensor<32x32xf32>
    scf.for %j = %lo to %hi step %one  : i32 {
      tt.store %at, %wide : tensor<32x32x!tt.ptr<f32>>
    }
    %product = tt.dot %x, %y, %carried : tensor<32x32xf32>
    scf.yield %product, %wide : tensor<32x32xf32>, tensor<32x32xf32>
  }
  %turned = tt.trans RESULT {order = array<i32: 1, 0>} : tensor<32x32xf32> -> tensor<32x32xf32>
"""
WHILE = """
  %loop:2 = scf.while (%carried = %zero, %other = %x) : (T, T) -> (T, T) {
    %goes_on = arith.cmpi sgt, %n, %none : i32
    scf.condition(%goes_on) %carried, %other : tensor<32x32xf32>, tensor<32x32xf32>
  } do {
  ^bb0(%inside: tensor<32x32xf32>, %beside: tensor<32x32xf32>):
    %kept = scf.if %even -> (tensor<32x32xf32>) {
      %product = tt.dot %x, %y, %zero : tensor<32x32xf32>
      scf.yield %product : tensor<32x32xf32>
    } else {
      scf.yield %inside : tensor<32x32xf32>
    }
    scf.yield %kept, %beside : tensor<32x32xf32>, tensor<32x32xf32>
  }
  %turned = tt.trans RESULT {order = array<i32: 1, 0>} : tensor<32x32xf32> -> tensor<32x32xf32>
"""


@pytest.mark.parametrize(
    ("code", "result", "wrong"),
    [
        (SUMS, "%loop#0", True),
        (SUMS, "%loop#1", False),
        (SUMS, "%carried", True),
        (SUMS, "%other", False),
        (WHILE, "%loop#0", True),
        (WHILE, "%loop#1", False),
        (WHILE, "%inside", True),
        (WHILE, "%beside", False),
        (WHILE, "%kept", True),
    ],
)
def test_braces_of_sums_and_branches_end_no_loop(code: str, result: str, wrong: bool) -> None:
    assert transposes_a_dot(code.replace("RESULT", result)) is wrong


def test_a_fingerprint_sees_what_the_compiler_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = shipped("planted_kernels")["sound"]
    first = fingerprint(sound)
    assert fingerprint(sound) == first
    assert len({fingerprint(form) for form in planted.forms()}) == len(planted.forms())
    changed = [
        replace(sound, signature={**sound.signature, "a": "*bf16"}),
        replace(sound, constants={"SIZE": 64}),
        replace(sound, num_warps=8),
        replace(sound, num_stages=3),
        replace(sound, aligned=frozenset()),
    ]
    assert len({first, *map(fingerprint, changed)}) == 1 + len(changed)
    assert fingerprint(replace(sound, name="another", spilled_bytes=8)) == first
    monkeypatch.setattr(planted, "SCALE", planted.tl.constexpr(3.0))  # a global that a function of the kernel reads
    assert fingerprint(sound) != first
    monkeypatch.undo()
    monkeypatch.setattr(planted, "_doubled", planted.sound)  # the code of what it calls
    assert fingerprint(sound) != first


# --- what is shipped ---


def test_every_kernel_has_a_form() -> None:
    formed = {name for form in shipped().values() for name in parts(form.kernel)}
    package = importlib.import_module(PACKAGE)
    for each in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{PACKAGE}.{each.name}")
        for value in vars(module).values():
            function = getattr(value, "fn", None)
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                assert f"{function.__module__}.{function.__qualname__}" in formed


def test_the_table_has_exactly_todays_forms_and_none_of_them_has_a_fault() -> None:
    kept = [Compiled(**row) for row in TABLE["forms"]]
    forms = shipped()
    prints = {name: fingerprint(form) for name, form in forms.items()}
    today = {(name, arch): found for name, found in prints.items() for arch in ARCHITECTURES}
    assert {(one.form, one.arch): one.fingerprint for one in kept} == today, "run `make kernels`"
    assert all(one.stated_bytes == forms[one.form].may_spill(one.arch) for one in kept), "run `make kernels`"
    assert not _faults(kept)
    assert f"triton=={TABLE['triton']}" in (ROOT / "constraints.txt").read_text(), "run `make kernels`"


def _sized(kernel: Any, constants: Mapping[str, Any], num_warps: int, num_stages: int) -> tuple[object, ...]:
    """What says how much a launch takes: sizes, precision, warps and stages; flags leave parts of a kernel out."""
    sizes = {name: value for name, value in constants.items() if type(value) in (int, str)}
    return kernel.fn.__qualname__, *sorted(sizes.items()), num_warps, num_stages


def test_what_is_launched_at_the_shipped_sizes_has_a_form() -> None:
    shipped_sizes = {_sized(f.kernel, f.constants, f.num_warps, f.num_stages) for f in shipped().values()}
    every = itertools.product(("linear",), (64, 128), (1, 16, 64), (True, False), ("ieee", "tf32", "bf16"))
    for kind, width, size, causal, precision in (*every, *(("mlp", *shape) for shape in SHIPPED)):
        case = Case(kind, width, size, 2 * size, 1, causal, precision=precision)
        if not runs(case):
            continue
        answer, inputs = Problem(case).prepared("triton", "cpu", torch.float32, precision)
        with launches(run=False) as found:
            z, _ = answer()
            torch.autograd.grad(z.sum(), inputs, allow_unused=True)
        assert len(found) >= 2
        for one in found:
            assert _sized(one.kernel, one.constants, one.num_warps, one.num_stages) in shipped_sizes, case.name


def _smallest_form_of_each_kernel() -> list[Form]:
    smallest: dict[object, Form] = {}
    for form in sorted(shipped().values(), key=lambda form: (sum(_sizes(form)), form.name)):
        smallest.setdefault(form.kernel, form)
    return list(smallest.values())


def _sizes(form: Form) -> list[int]:
    return [value for value in form.constants.values() if type(value) is int]


def test_a_form_of_every_kernel_compiles_for_hopper_as_the_table_says() -> None:
    chosen = [form.name for form in _smallest_form_of_each_kernel()]
    found = compiled([(PACKAGE, name, 90) for name in chosen])
    assert not _faults(found)
    kept = {row["form"]: row for row in TABLE["forms"] if row["arch"] == 90}
    for one in found:
        row = kept[one.form]
        assert (one.shared_bytes, one.spilled_bytes) == (row["shared_bytes"], row["spilled_bytes"])
        assert one.registers == row["registers"]
