"""Triton kernels: what the compiler says of them, how far they are from the definition, how long they take.

    python benchmarks/kernels.py --compile                     # every form for every architecture; needs no GPU
    python benchmarks/kernels.py --compile --only "linear" --arch 90     # some of them; nothing is kept
    python benchmarks/kernels.py --interpret                   # in Triton's interpreter: every pair of values, minutes
    python benchmarks/kernels.py --interpret --strength 3      # every three values
    python benchmarks/kernels.py --interpret --all             # the whole product of cases: hours
    python benchmarks/kernels.py --device cuda                 # the whole product on a GPU, then times

`--compile` writes `benchmarks/results/kernels-compiled.json` and `.md` and exits with 1 if a form must not be shipped.
The others write to `--out`, case by case, and exit with 1 if one is further from the definition than its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from kernels_compiled import ARCHITECTURES, Compiled, compiled

RESULTS = Path(__file__).parent / "results" / "kernels-compiled.json"


def compile_all(only: str, architectures: Sequence[int], out: Path | None) -> int:
    """Compile forms, print and keep what they take; how many faults forbid to ship them.

    What `out` has of forms that have not changed since is not compiled again.
    """
    import triton

    from ttt.ops.triton.forms import PACKAGE, fingerprint, shipped

    forms = {name: form for name, form in shipped().items() if only in name}
    if not forms:
        sys.exit(f"no form's name has {only!r} in it; there are {', '.join(shipped())}")
    wanted = {(name, arch): fingerprint(form) for name, form in forms.items() for arch in architectures}
    before = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else {"triton": None}
    rows: dict[tuple[str, int], Compiled] = {}
    for one in (Compiled(**row) for row in (before["forms"] if before["triton"] == triton.__version__ else ())):
        if wanted.get((one.form, one.arch)) == one.fingerprint:
            rows[one.form, one.arch] = replace(one, stated_bytes=forms[one.form].may_spill(one.arch))

    def keep(one: Compiled | None = None) -> None:
        if one is not None:
            rows[one.form, one.arch] = one
            print(f"{one.form}, sm_{one.arch}: {_cell(one)}, {one.seconds:.1f} s", file=sys.stderr, flush=True)
        if out is not None:
            ordered = [asdict(rows[key]) for key in wanted if key in rows]
            for row in ordered:
                del row["seconds"]  # they say something of this machine alone
            out.write_text(
                json.dumps({"triton": triton.__version__, "forms": ordered}, indent=1) + "\n", encoding="utf-8"
            )

    compiled([(PACKAGE, name, arch) for name, arch in wanted if (name, arch) not in rows], tell=keep)
    keep()
    found = [rows[key] for key in wanted]
    print(table(found))
    if out is not None:
        out.with_suffix(".md").write_text(f"{_HEAD.format(triton.__version__)}\n{table(found)}\n", encoding="utf-8")
    faults = [f"{one.form}, sm_{one.arch}: {fault}" for one in found for fault in one.faults()]
    print("\n".join(faults) or "every form can be shipped")
    return len(faults)


_HEAD = """# What compiled kernels take

Compiled without a GPU by `make kernels`, with Triton {}; none of it says how fast a kernel is. Each cell: registers of
a thread / bytes that a thread spills (and may, as its form states, where it may) / KiB of shared memory of a block. An
A100 (sm_80) has 163 KiB for a block, an H100 or H200 (sm_90) and a B200 (sm_100) 227 KiB.
"""


def table(found: Sequence[Compiled]) -> str:
    """A row for each form, in Markdown."""
    architectures = sorted({one.arch for one in found})
    cells = {(one.form, one.arch): _cell(one) for one in found}
    shape = {one.form: f"{one.num_warps} | {one.num_stages}" for one in found}
    head = " | ".join(["form", "warps", "stages", *(f"sm_{arch}" for arch in architectures)])
    rule = " | ".join(["---", *["---:"] * (2 + len(architectures))])
    rows = [" | ".join([name, shape[name], *(cells[name, arch] for arch in architectures)]) for name in shape]
    return "\n".join(f"| {row} |" for row in (head, rule, *rows))


def _cell(one: Compiled) -> str:
    if one.error is not None:
        return "does not compile"
    spilled = f"{one.spilled_bytes} (≤ {one.stated_bytes})" if one.stated_bytes else str(one.spilled_bytes)
    return f"{one.registers} / {spilled} / {one.shared_bytes / 1024:.0f}"


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--device", default="cuda", help="with neither of the two above")
    parser.add_argument("--only", default="", help="a part of names of forms or cases")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="with --interpret: the whole product of cases")
    parser.add_argument("--strength", type=int, default=2, choices=(2, 3), help="with --interpret: pairs, or threes")
    parser.add_argument("--quick", action="store_true", help="a case of each kind")
    parser.add_argument("--implementation", default="triton", help="what is compared with the definition")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.compile:
        whole = not arguments.only and set(arguments.arch) == set(ARCHITECTURES)
        out = arguments.out or (RESULTS if whole else None)
        sys.exit(compile_all(arguments.only, arguments.arch, out) > 0)
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    from kernels_compared import compare_and_time

    device = "cpu" if arguments.interpret else arguments.device
    sys.exit(compare_and_time(arguments, device) > 0)


if __name__ == "__main__":
    main()
