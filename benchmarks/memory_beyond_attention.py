"""Does TTT make a pretrained model remember what its attention no longer sees?

    python benchmarks/memory_beyond_attention.py            # the size of two CPU cores: one to two hours
    python benchmarks/memory_beyond_attention.py --device cuda
    python benchmarks/memory_beyond_attention.py --quick    # a smoke test in seconds, without network

SmolLM2-135M-Instruct stays frozen; its attention sees a window and some sinks. TTT learns from source files of some
works and is measured on those of others, by position: beside the model with its gates closed, with fast weights that
are reset at every window, beside the same adapter without inner learning and a LoRA of as many parameters, both trained
on the same tokens, and beside full attention. What TTT gains over closed gates may be adaptation to the domain; what it
gains over the reset arm and over the equal-sized controls is memory.

What is finished is kept in the folder `--work`, so that a run that was killed goes on. Results go to `--out`.
`docs/memory.md` tells what came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import memory_backbone as backbone
import memory_texts as texts
import torch
from memory_results import buckets, compare, draw, report
from memory_start import Start, find_start, sharpened
from memory_training import NO_MEMORY, Prediction, Size, Texts, Upper, losses_by_bin, reset_every
from torch import Tensor, nn

from ttt.files import write_text
from ttt.train.setup import device_in_words

MEMORY = {
    "num_heads": 1,
    "qkvo_bias": True,
    "normalize_target": True,
    "rope": "none",
    "input_norm": "rms",
    "base_lr": 128.0,
    "mini_batch_size": 16,
}
"""Settings of TTT for a memory; `docs/memory.md` tells why."""

EPS = 1e-6
ABLATION_DOCUMENTS = 8
"""Held-out documents, and those with repeated passages, on which an ablation is measured."""

CPU = Size(
    window=64, sinks=4, length=512, sites=(29,), train=(3, 16), held_out=(1, 16, 12), steps=50, batch=2, seeds=3,
    ablation_steps=12, settings=MEMORY,
)  # fmt: skip
CUDA = Size(
    window=128, sinks=4, length=2048, sites=(23, 29), train=(24, 96), held_out=(4, 20, 48), steps=2000, batch=8,
    seeds=3, ablation_steps=120, matrix_lr=1e-4, settings=MEMORY,
)  # fmt: skip
QUICK = Size(
    window=16, sinks=2, length=128, sites=(3,), train=(1, 2), held_out=(1, 2, 2), steps=2, batch=2, seeds=1,
    ablation_steps=1, settings={**MEMORY, "mini_batch_size": 8},
)  # fmt: skip


def ablations(size: Size) -> dict[str, dict[str, Any]]:
    """What is changed in each, from the settings of the main table."""
    c, rate = size.settings["mini_batch_size"], size.settings["base_lr"]
    by_size = {f"mini-batch {n}": {"mini_batch_size": n, "base_lr": rate * n / c} for n in (1, 64)}
    by_rate = {f"base_lr {rate * factor:g}": {"base_lr": rate * factor} for factor in (1 / 128, 1 / 4, 4, 16)}
    below = tuple(max(0, one - 6) for one in size.sites)
    return {
        "as in the table": {},
        "drawn at random, all of it learns": {"drawn": True},
        "preset lm, drawn at random": {
            "drawn": True,
            "rope": "mini_batch",
            "input_norm": "none",
            "base_lr": 1.0,
            "num_heads": None,
            "qkvo_bias": False,
            "normalize_target": False,
        },
        "beside a LoRA that learns too": {"beside_lora": True},
        "projections learn too": {"matrix_lr": size.drawn_lr},
        **by_rate,
        "mini-batch 64": by_size["mini-batch 64"],
        "heads of the backbone": {"num_heads": None},
        "mlp, heads of the backbone": {"layer_type": "mlp", "num_heads": None, "base_lr": rate / 12},
        "gates from 0.01": {"initial_gating_alpha": 0.01},
        "gates from 1": {"initial_gating_alpha": 1.0},
        f"after layer {', '.join(map(str, below))}": {"sites": below},
        "mini-batch 1": by_size["mini-batch 1"],
    }


class Experiment:
    """The model, the documents, and what has been measured so far."""

    def __init__(self, size: Size, work: Path, device: torch.device, *, quick: bool) -> None:
        self.size, self.work, self.quick = size, work, quick
        work.mkdir(parents=True, exist_ok=True)
        made, encode = backbone.tiny() if quick else backbone.pretrained(work)
        self.model: Any = made.to(device)
        self.head: Tensor = self.model.lm_head.weight.detach()
        self.depths = sorted({*size.sites, *(max(0, one - 6) for one in size.sites)})
        self.documents = self._read(encode)
        self.tokens = {name: [one.tokens for one in some] for name, some in self.documents.items()}
        with size.limited(self.model):
            self.states = {
                name: backbone.hidden_states(self.model, self.depths, some, batch=4, kept=work / f"{name}.pt")
                for name, some in self.tokens.items()
            }
        self.starts: dict[int, Start] = {}
        self.settings = json.dumps([dataclasses.asdict(size), self.tokens], sort_keys=True)
        self.untrained = json.dumps([size.window, size.sinks, size.sites, self.tokens], sort_keys=True)

    def _read(self, encode: texts.Encode) -> dict[str, list[Any]]:
        """The documents of training and the held-out ones, and those with repeated passages made of each."""
        size, files = self.size, self.size.held_out[0]
        if self.quick:
            some = list(texts.own_documents(encode, length=size.length, at_most=6))
            train, held_out = some[:3], some[3:]
        else:
            of = partial(texts.documents, folder=self.work, encode=encode, length=size.length)
            train = [one for work in texts.TRAIN for one in of(work, at_most=size.train[0])]
            works = texts.HELD_OUT[: size.held_out[1]]
            held_out = [one for work in works for one in of(work, at_most=files)]
        repeat = partial(texts.recalls, window=size.window, length=size.length)
        return {
            "train": train,
            "train_repeated": repeat(train, size.train[1], seed=1),
            "held_out": held_out,
            "recall": repeat(held_out, size.held_out[2], seed=2),
        }

    def texts(self, name: str, first: int, *, few: bool = False) -> Texts:
        """Documents as inputs of layer `first`; of repeated passages only the repetitions are scored.

        Of the documents of training, it is what is beyond the window. If few are asked for, it is the first of them,
        beyond two windows.
        """
        tokens, window = torch.tensor(self.tokens[name]), self.size.window
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        if name in ("train", "held_out"):
            scored[:, 2 * window if few else window + 1 if name == "train" else 1 :] = True
        for row, one in zip(scored, self.documents[name], strict=True):
            for begin, end in getattr(one, "spans", ()):
                row[begin + 1 : end] = True  # the passage's first token cannot be known
        some = slice(ABLATION_DOCUMENTS if few else None)
        return Texts(tokens[some], self.states[name][first][some], scored[some])

    def upper(self, sites: tuple[int, ...]) -> Upper:
        """The layers from the first of these sites on."""
        for site in sites:
            if site not in self.starts:
                self.starts[site] = self._start(site)
        return Upper(self.model, dataclasses.replace(self.size, sites=sites), self.starts)

    def _start(self, site: int) -> Start:
        last = site == len(self.model.model.layers) - 1
        embedding = self.model.get_input_embeddings().weight.detach()
        norm = self.model.model.norm.weight.detach()
        hidden, tokens = [], []
        below = backbone.cut(self.model, site, site + 1)
        if last:
            below.model.norm = nn.Identity()
        for name in ("train", "train_repeated"):
            some = self.texts(name, site if site in self.depths else self.depths[0])
            with torch.no_grad(), self.size.limited(self.model):
                for rows in torch.arange(len(some.tokens)).split(4):
                    ids, states, _ = some.rows(rows.tolist(), self.head.device)
                    hidden.append(below.model(inputs_embeds=states, use_cache=False).last_hidden_state)
                    tokens.append(ids)
        scale = (lambda whitening: whitening / norm[:, None]) if last else None
        seen, read = torch.cat(hidden), torch.cat(tokens)
        found = find_start(seen, read, embedding, scale, eps=EPS)
        return sharpened(found, seen, read, window=self.size.window, steps=self.size.sharpening_steps, eps=EPS)

    # --- what is measured ---

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured under this name with these settings, in this run or an earlier one."""
        path = self.work / f"{name.replace(' ', '_').replace(',', '')}.json"
        on = self.untrained if name in ("closed", "full") else self.settings
        digest = hashlib.sha256((name + on).encode()).hexdigest()
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["digest"] == digest:
                return found["measured"]
        begin = time.perf_counter()
        measured = measure()
        write_text(path, json.dumps({"digest": digest, "measured": measured}))
        print(f"{time.strftime('%H:%M:%S')} {name}: {time.perf_counter() - begin:.0f} s", flush=True)
        return measured

    def losses(self, upper: Upper, *, few: bool = False) -> dict[str, Any]:
        """What the upper layers lose, on held-out documents by bin and on repeated passages."""

        def of(name: str) -> list[list[float | None]]:
            some = self.texts(name, upper.first, few=few)

            def hidden_of(number: int) -> Tensor:
                return upper.hidden(some.rows([number], upper.device)[1])

            step = self.size.window // 2 if name == "held_out" else self.size.length
            return losses_by_bin(hidden_of, self.head, some, step)

        return {name: of(name) for name in ("held_out", "recall")}

    def full_attention(self) -> dict[str, Any]:
        """What the plain model loses if its attention sees everything."""

        def of(name: str) -> list[list[float | None]]:
            some = self.texts(name, self.depths[0])

            def hidden_of(number: int) -> Tensor:
                ids = some.tokens[number : number + 1].to(self.head.device)
                answer: Tensor = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
                return answer

            step = self.size.window // 2 if name == "held_out" else self.size.length
            return losses_by_bin(hidden_of, self.head, some, step)

        return {name: of(name) for name in ("held_out", "recall")}

    def trained(self, upper: Upper, seed: int, steps: int, *, few: bool = False) -> dict[str, Any]:
        """Train what is in the upper layers, and measure it."""
        plain, repeated = self.texts("train", upper.first), self.texts("train_repeated", upper.first)
        size = sum(p.numel() for p in upper.learning.values())
        losses = Prediction(upper, plain, repeated).train(seed, steps)
        learned = sum(p.numel() for p in upper.learning.values())
        found = {**self.losses(upper, few=few), "training": losses, "parameters": size, "learned": learned}
        if any(adapter.layer.config.base_lr > NO_MEMORY for adapter in upper.adapters.values()):
            with reset_every(upper, self.size.window):
                found["reset"] = self.losses(upper, few=few)
        gates = [adapter.gate.gating_alpha.abs().mean().item() for adapter in upper.adapters.values()]
        found["gates"] = [round(one, 4) for one in gates]
        upper.clear()
        return found

    def adapters(self, seed: int, steps: int, *, few: bool = False, **changes: Any) -> dict[str, Any]:
        """Train adapters with some settings changed, or beside a LoRA, and measure them."""
        upper = self.upper(changes.get("sites", self.size.sites))
        if changes.pop("beside_lora", False):
            upper.add_lora(seed, 5 * self.head.shape[1] ** 2)  # as large as an adapter with one head
        upper.inject(seed, **changes)
        return self.trained(upper, seed, steps, few=few)

    def lora(self, seed: int, parameters: int) -> dict[str, Any]:
        """Train a LoRA that is about as large on the same documents, and measure it."""
        upper = self.upper(self.size.sites)
        rank = upper.add_lora(seed, parameters)
        return {**self.trained(upper, seed, self.size.steps), "rank": rank}

    def main_table(self) -> dict[str, dict[str, Any]]:
        """By arm and seed, what was measured."""
        upper = self.upper(self.size.sites)
        arms: dict[str, dict[str, Any]] = {
            "closed": {"0": self.kept("closed", lambda: self.losses(upper))},
            "full": {"0": self.kept("full", self.full_attention)},
        }
        for seed in range(self.size.seeds):
            steps = self.size.steps
            found = self.kept(f"ttt {seed}", partial(self.adapters, seed, steps))
            arms.setdefault("ttt", {})[str(seed)] = found
            arms.setdefault("reset", {})[str(seed)] = found["reset"]
            still = self.kept(f"no memory {seed}", partial(self.adapters, seed, steps, base_lr=NO_MEMORY))
            arms.setdefault("no memory", {})[str(seed)] = still
            arms.setdefault("lora", {})[str(seed)] = self.kept(
                f"lora {seed}", partial(self.lora, seed, found["parameters"])
            )
        return arms

    def ablation_table(self) -> dict[str, dict[str, Any]]:
        """Short runs of one seed with one thing changed: on some documents beyond two windows, and on repeats."""
        closed, steps = self.kept("closed", lambda: self.losses(self.upper(self.size.sites))), self.size.ablation_steps
        rows: dict[str, dict[str, Any]] = {}
        for name, changes in ablations(self.size).items():
            found = self.kept(f"ablation {name}", partial(self.adapters, 0, steps, few=True, **changes))
            rows[name] = {"gates": found["gates"]}
            for part in ("held_out", "recall"):
                some = slice(ABLATION_DOCUMENTS)
                arms = {"closed": closed[part][some], "reset": found["reset"][part], "ttt": found[part]}
                compared = compare(
                    {arm: {"0": one} for arm, one in arms.items()}, self.works(part)[some], self.beyond(part)
                )
                rows[name][part] = {key: value for key, value in compared.items() if "−" in key}
        return rows

    # --- what is told ---

    def works(self, part: str) -> list[str]:
        """The work of each document; of one with repeats, that of the passage."""
        of = self.documents[part]
        return [one.work if part == "held_out" else one.works.partition(",")[0] for one in of]

    def beyond(self, part: str) -> range:
        """The bins beyond two windows; of repeated passages there is one bin."""
        return range(4, 2 * self.size.length // self.size.window) if part == "held_out" else range(1)

    def results(self, *, with_ablations: bool) -> dict[str, Any]:
        """Everything that is measured, from what is kept or anew."""
        arms = self.main_table()
        ablations = {"steps": self.size.ablation_steps, "rows": self.ablation_table()} if with_ablations else None
        size, held_out = (
            self.size,
            {arm: {s: one["held_out"] for s, one in seeds.items()} for arm, seeds in arms.items()},
        )
        recall = {arm: {s: one["recall"] for s, one in seeds.items()} for arm, seeds in arms.items()}
        works, step = self.works("held_out"), size.window // 2
        bins = {
            name: range(begin // step, end // step) for name, (begin, end) in buckets(size.window, size.length).items()
        }
        sources = {(one.work, one.licence) for name in ("train", "held_out") for one in self.documents[name]}
        return {
            "model": "a tiny random Llama" if self.quick else f"SmolLM2-135M-Instruct ({backbone.WHEEL}, Apache-2.0)",
            "quick": self.quick,
            "device": device_in_words(self.head.device),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
            | {"python": platform.python_version()},
            "seeds": size.seeds,
            "size": dataclasses.asdict(size),
            "training_documents": len(self.documents["train"]),
            "tokens_read_in_training": size.steps * size.batch * size.length,
            "works": dict(sorted(sources)),
            "bin": step,
            "parameters": {arm: arms[arm]["0"]["parameters"] for arm in ("ttt", "no memory", "lora")},
            "parameters_that_learn": {arm: arms[arm]["0"]["learned"] for arm in ("ttt", "no memory", "lora")},
            "lora_rank": arms["lora"]["0"]["rank"],
            "gates": {seed: one["gates"] for seed, one in arms["ttt"].items()},
            "held_out": {name: compare(held_out, works, some) for name, some in bins.items()},
            "recall": {"repeated": compare(recall, self.works("recall"), range(1))},
            "by_position": {arm: _curve(seeds) for arm, seeds in held_out.items()},
            "ablations": ablations,
            "speed": self.kept("speed", self.speed),
        }

    def speed(self) -> dict[str, Any]:
        """Seconds that the whole model takes, forward, and forward and backward to its inputs; plain and with TTT."""
        layers = len(self.model.model.layers)
        whole = Upper(self.model, dataclasses.replace(self.size, sites=(0,)), self.upper(self.size.sites).starts)
        kinds: dict[str, dict[str, Any]] = {
            "plain": {},
            "TTT as in the table": {"sites": self.size.sites},
            "TTT in the middle half": {
                "sites": range(layers // 4, layers - layers // 4),
                "drawn": True,
                "num_heads": None,
            },
        }
        ids = torch.tensor(self.tokens["held_out"][:1], device=self.head.device)
        times: dict[str, list[float]] = {}
        for _ in range(1 if self.quick else 2):  # in turns, so that what else the machine does hits all alike
            for name, changes in kinds.items():
                if changes:
                    whole.inject(0, **changes)
                for what in ("forward", "forward and backward"):
                    x = self.model.get_input_embeddings()(ids).requires_grad_(what != "forward")
                    begin = time.perf_counter()
                    with torch.set_grad_enabled(what != "forward"):
                        hidden = whole.hidden(x)
                    if what != "forward":
                        hidden.square().mean().backward()
                    hidden.sum().item()  # waits for the device
                    times.setdefault(f"{name}, {what}", []).append(time.perf_counter() - begin)
                whole.clear()
        return {"tokens": ids.numel(), "seconds": {name: round(min(some), 3) for name, some in times.items()}}


def _curve(seeds: dict[str, Any]) -> list[float]:
    """The mean loss in each bin, over documents and seeds."""
    documents = [one for some in seeds.values() for one in some]
    return [round(fmean(one for one in column if one is not None), 5) for column in zip(*documents, strict=True)]


def main(arguments: list[str]) -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda runs the full size")
    parser.add_argument("--quick", action="store_true", help="a tiny random model on Python's own library")
    parser.add_argument("--no-ablations", action="store_true", help="the main table alone")
    parser.add_argument("--work", type=Path, help="a folder for what is fetched and finished; a run goes on from it")
    parser.add_argument("--out", type=Path, help="a JSON file for the results, with a picture beside it")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    size = QUICK if given.quick else CUDA if device.type == "cuda" else CPU
    default = Path(__file__).parent / "results" / f"memory_beyond_attention_{device.type}.json"
    out = given.out or (None if given.quick else default)
    with tempfile.TemporaryDirectory() if given.quick and given.work is None else nullcontext() as folder:
        work = given.work or (Path(folder) if folder else Path("runs") / f"memory_{device.type}")
        found = Experiment(size, work, device, quick=given.quick).results(with_ablations=not given.no_ablations)
    print(report(found))
    if out is not None:
        write_text(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        draw(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
