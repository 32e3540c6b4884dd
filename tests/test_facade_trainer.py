"""A model with TTT under `transformers.Trainer` and `accelerate`, alone and beside LoRA."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_llama import logits, small_llama, some_tokens
from transformers import Trainer, TrainingArguments

import ttt
from ttt.adapter_file import read_info

CONFIG = ttt.TTTConfig(layers="middle", mini_batch_size=4)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning"),
]


def _data(count: int = 16) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in some_tokens(count, 12)]


def _trainer(model: Any, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 20,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "save_steps": 10,
            "logging_steps": 5,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 1,
            **settings,
        },
    )
    return Trainer(model=model, args=arguments, train_dataset=_data(), eval_dataset=_data(4))


def _losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers logs, which it keeps from the loggers above its own."""
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("transformers")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.setLevel(logging.WARNING)  # other tests' programs tell it to be silent
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_twenty_steps_saved_and_resumed(tmp_path: Path, said: list[str]) -> None:
    base = small_llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trainer = _trainer(ttt.get_ttt_model(base, CONFIG), tmp_path / "run")
    trainer.train()
    losses = _losses(trainer)
    assert losses[-1] < losses[0] - 0.05
    model, tokens = trainer.model, some_tokens()
    trained = logits(model, tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)

    saved = tmp_path / "run" / "checkpoint-20"
    assert read_info(saved).parameters == 9360
    assert not (saved / "config.json").exists()
    assert (saved / "model.safetensors").stat().st_size < 2 * (saved / "adapter_model.safetensors").stat().st_size
    assert torch.equal(logits(ttt.TTTModel.from_pretrained(small_llama(), saved), tokens), trained)

    resumed = _trainer(ttt.get_ttt_model(small_llama(), CONFIG, seed=5), tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert torch.equal(logits(resumed.model, tokens), trained)
    assert not [line for line in said if "missing keys" in line]
    logging.getLogger("transformers.trainer").warning("heard")
    assert said[-1] == "heard"

    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "model.safetensors").exists()
    assert torch.equal(logits(ttt.TTTModel.from_pretrained(small_llama(), tmp_path / "final"), tokens), trained)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = _trainer(
        ttt.get_ttt_model(small_llama(), CONFIG),
        tmp_path,
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is not the last one
    )
    trainer.train()
    best = ttt.TTTModel.from_pretrained(small_llama(), tmp_path / "checkpoint-2")
    last = ttt.TTTModel.from_pretrained(small_llama(), tmp_path / "checkpoint-4")
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert torch.equal(logits(trainer.model, some_tokens()), logits(best, some_tokens()))
    assert not torch.equal(logits(trainer.model, some_tokens()), logits(last, some_tokens()))


@pytest.mark.parametrize("lora_first", [True, False])
def test_beside_lora_both_are_trained_and_resumed(lora_first: bool, tmp_path: Path) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        if lora_first:
            return ttt.get_ttt_model(get_peft_model(small_llama(), lora), CONFIG)
        return ttt.get_ttt_model(get_peft_model(ttt.get_ttt_model(small_llama(), CONFIG), lora))

    model, tokens = made(), some_tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = _trainer(model, tmp_path, max_steps=4, save_steps=2)
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"lora" if "lora_" in name else "ttt" if ".ttt." in name else name for name in moved} == {"lora", "ttt"}
    trained = logits(model, tokens)
    resumed = _trainer(made(), tmp_path, max_steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.model, tokens), trained)
    loaded = ttt.TTTModel.from_pretrained(small_llama(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(loaded, tokens), trained)


def test_accelerate_prepares_it(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = ttt.get_ttt_model(small_llama(), CONFIG).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    tokens, losses = some_tokens(4), []
    for _ in range(6):
        loss = prepared(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    expected = logits(prepared.eval(), tokens)
    assert torch.equal(logits(ttt.TTTModel.from_pretrained(small_llama(), tmp_path), tokens), expected)
