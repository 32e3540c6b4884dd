"""LoRA as the rival in the same house: what it computes, where it goes, training, files, evaluation, and wrong ones."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy import Attention, Block, MakingToy, ToyBackbone, ToyModel, ToyOptions

from ttt import inject
from ttt.adapter import gates_closed
from ttt.adapter_file import MODEL, backbone_identity, load_adapter, read_info, save_adapter
from ttt.check import check_config
from ttt.check.estimate import estimate
from ttt.config import RunConfig
from ttt.config.lora import Linears, LoraSettings
from ttt.costs import layer_parameters, lora_parameters, matched_rank
from ttt.errors import AdapterMismatchError, ConfigError, InactiveLayerError, InjectionError, NonFiniteError, UsageError
from ttt.laws import CHECKS, Bench, MethodBrokenError
from ttt.lora import Lora, LoraLinear, LoraPlan, shapes_of
from ttt.plugins import LoraSite, get_backbone, run_config_model
from ttt.train import pictures, train
from ttt.train.checkpoint import OPTIMIZER
from ttt.train.metrics import read_metrics
from ttt.train.setup import build

TOY = MakingToy()
TINY = {"name": "toy", "num_layers": 2, "dim": 16, "num_heads": 2}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "draw_run", lambda run: [])


def config(run_dir: Path | None = None, *, backbone: ToyBackbone = TOY, **sections: Any) -> RunConfig:
    ttt = {"mini_batch_size": 4, "layers": (1,), **sections.pop("ttt", {})}
    steps = {"max_steps": 4, "lr": 0.01, "evidence_freq": 2, "device": "cpu", "cpu_threads": 1}
    return run_config_model(backbone).model_validate(
        {
            "backbone": TINY,
            "adapter": "lora",
            "ttt": ttt,
            "train": {**steps, **sections.pop("train", {})},
            "run_dir": None if run_dir is None else str(run_dir),
            **sections,
        }
    )


def run(asked: RunConfig, *, backbone: ToyBackbone = TOY, resume: bool = False) -> tuple[Any, str]:
    told = io.StringIO()
    result = train(asked, backbone, resume=resume, console=Console(width=300, file=told))
    return result, told.getvalue()


def toy_with_lora(linears: Linears = "all", rank: int = 2, scaling: float = 2.0) -> tuple[nn.Module, Lora]:
    model = TOY.build(TOY.tiny(), device="cpu", dtype=torch.float32)
    return model, Lora(model, LoraPlan(tuple(TOY.lora_sites(model, linears)), LoraSettings(rank, scaling, linears)))


@torch.no_grad()
def filled(lora: Lora) -> Lora:
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.parameters().values():
        parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return lora


# --- what it computes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_with_lora_is_kyutais_to_the_last_bit(dtype: torch.dtype) -> None:
    from moshi.modules.lora import LoRALinear

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False)).to(dtype)
    theirs = LoRALinear(12, 20, 3, 2.0, dtype=dtype)
    theirs.frozen_W = copy.deepcopy(model[0])
    lora = filled(Lora(model, LoraPlan((LoraSite("0", model[0]),), LoraSettings(3, 2.0, "all"))))
    theirs.load_state_dict({name.removeprefix("0."): p for name, p in lora.parameters().items()}, strict=False)
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    y, expected = model(x), theirs(x)
    assert torch.equal(y, expected)
    one, other = (torch.autograd.grad(each.float().square().sum(), (x,)) for each in (y, expected))
    assert torch.equal(one[0], other[0])


def test_lora_starts_as_the_plain_model_and_a_keeps_kaimings_bounds() -> None:
    model, lora = toy_with_lora()
    for linear in lora.linears.values():
        assert linear.lora_B.weight.count_nonzero() == 0
        bound = 1 / math.sqrt(linear.in_features)  # kaiming_uniform with a = √5, as moshi-finetune has it
        assert 0.5 * bound < linear.lora_A.weight.abs().max() <= bound
    again = toy_with_lora()[1].parameters()
    assert all(torch.equal(value, again[name]) for name, value in lora.parameters().items())
    assert "rank=2" in repr(model)


def test_a_linear_layer_of_another_class_keeps_what_it_is() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubling(4, 4))
    x = torch.randn(3, 4)
    plain = model(x)
    lora = Lora(model, LoraPlan((LoraSite("0", model[0]),), LoraSettings(2, 1.0, "all")))
    assert isinstance(model[0], Doubling)
    assert isinstance(model[0], LoraLinear)
    assert torch.equal(model(x), plain)
    lora.remove()
    assert type(model[0]) is Doubling
    assert not {"lora_scaling", "lora_off"} & vars(model[0]).keys()


def _offloaded(model: nn.Module) -> LoraSite:
    """A layer whose forward is one of its own, as offloading makes it."""
    linear = model.get_submodule("head")
    assert isinstance(linear, nn.Linear)
    linear.forward = linear.forward  # type: ignore[method-assign]
    return LoraSite("head", linear)


def test_what_cannot_have_lora_is_refused_and_nothing_is_changed() -> None:
    model, lora = toy_with_lora("attention")
    plan = LoraPlan(tuple(TOY.lora_sites(model, "all")), LoraSettings(2, 2.0, "all"))
    with pytest.raises(InjectionError, match="has LoRA already"):
        Lora(model, plan)
    lora.remove()
    for sites, told in (
        ((), "names no linear layer"),
        ((LoraSite("nowhere", nn.Linear(2, 2)),), "is not the one that the backbone offers"),
        ((plan.sites[0], plan.sites[0]), "has LoRA already"),
        ((_offloaded(model),), "forward is replaced on the object itself"),
        ((replace(plan.sites[0], host=model, host_class=nn.Linear),), "not a subclass of ToyModel"),
    ):
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(InjectionError, match=told):
            inject.apply(model, TOY.sites(model), config().ttt, lora=LoraPlan(sites, plan.settings))
        assert [name for name, _ in model.named_modules()] == names


def test_a_plain_state_dict_still_loads_and_the_fingerprint_is_the_plain_ones(tmp_path: Path) -> None:
    asked = config(lora={"rank": 2})
    plain = TOY.build(asked.backbone, device="cpu", dtype=torch.float32)
    model, injection = build(asked, TOY, CPU)
    model.load_state_dict(plain.state_dict())
    save_adapter(tmp_path, injection, backbone={})
    bare = inject.apply(plain, TOY.sites(plain), asked.injected)
    from ttt.adapter_file import weights_fingerprint

    assert read_info(tmp_path).backbone_weights == weights_fingerprint(bare)


# --- Moshi ---


MOSHI = get_backbone("moshi")


def moshi_with_lora(linears: Linears) -> tuple[Any, Lora]:
    model = MOSHI.build(MOSHI.tiny(), device="cpu", dtype=torch.float32)
    sites = MOSHI.lora_sites(model, linears)  # type: ignore[attr-defined]
    return model, Lora(model, LoraPlan(tuple(sites), LoraSettings(2, 2.0, linears)))


@torch.no_grad()
def moshi_outputs(model: Any, codes: Tensor) -> tuple[Tensor, Tensor]:
    out = model(codes)
    return out.logits.nan_to_num(), out.text_logits.nan_to_num()


@pytest.mark.parametrize("preset", ["demo", "7b"])
def test_moshis_linear_layers_are_counted_without_building_it(preset: str) -> None:
    from ttt_moshi.options import MoshiOptions

    options = MoshiOptions(preset=preset)
    model = MOSHI.build(options, device="meta", dtype=torch.bfloat16)
    for linears, count in (("all", {"demo": 97, "7b": 337}[preset]), ("attention", {"demo": 8, "7b": 64}[preset])):
        shapes = shapes_of(MOSHI.lora_sites(model, linears))  # type: ignore[attr-defined]
        assert MOSHI.lora_shapes(options, linears) == shapes  # type: ignore[attr-defined]
        assert sum(shapes.values()) == count


def test_moshi_with_lora_is_kyutais_model_with_kyutais_lora() -> None:
    from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora

    model, lora = moshi_with_lora("all")
    filled(lora)
    theirs = MOSHI.build(MOSHI.tiny(), device="cpu", dtype=torch.float32)
    replace_all_linear_with_lora(theirs, 2, 2.0)
    assert list(lora.linears) == [name for name, each in theirs.named_modules() if isinstance(each, LoRALinear)]
    unknown = theirs.load_state_dict(dict(lora.parameters()), strict=False).unexpected_keys
    assert not unknown
    codes = MOSHI.example_batch(model, batch_size=2, tokens=7, seed=0)
    for training in (False, True):
        found, expected = (moshi_outputs(each.train(training), codes) for each in (model, theirs))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def _streamed(model: Any, codes: Tensor) -> Tensor:
    """Of each frame the text logits, then each codebook's, as `LMGen` asks for them one by one."""
    found = []
    with model.eval().streaming(codes.shape[0]):
        for frame in range(codes.shape[2]):
            hidden, text = model.forward_text(codes[:, :, frame : frame + 1])
            found.append(text.flatten())
            with model.depformer.streaming(codes.shape[0]):
                for book in range(model.dep_q):
                    before = codes[:, book : book + 1, frame : frame + 1]
                    found.append(model.forward_depformer(book, before, hidden).flatten())
    return torch.cat(found)


def test_each_linear_layer_of_moshi_shows_its_lora_in_streaming() -> None:
    """Each layer is called, and what comes out is what kyutai's LoRA gives; B of one layer alone is heard."""
    from moshi.modules.lora import replace_all_linear_with_lora

    model, lora = moshi_with_lora("all")
    codes = MOSHI.example_batch(model, batch_size=1, tokens=3, seed=0)
    plain, called = _streamed(model, codes), set[str]()
    for path, linear in filled(lora).linears.items():
        linear.lora_B.register_forward_hook(lambda *_, path=path: called.add(path))
    theirs = MOSHI.build(MOSHI.tiny(), device="cpu", dtype=torch.float32)
    replace_all_linear_with_lora(theirs, 2, 2.0)
    theirs.load_state_dict(dict(lora.parameters()), strict=False)
    assert torch.equal(_streamed(model, codes), _streamed(theirs, codes))
    assert called == lora.linears.keys()
    with gates_closed(model):
        assert torch.equal(_streamed(model, codes), plain)
    for path in ("transformer.layers.1.gating.linear_in", "depformer.layers.0.gating.3.linear_out"):
        with torch.no_grad():
            for name, parameter in lora.parameters().items():
                if name.endswith("lora_B.weight"):
                    parameter.fill_(0.3 if name.startswith(f"{path}.") else 0.0)
        assert not torch.equal(_streamed(model, codes), plain), path


def test_moshis_cross_attention_is_refused() -> None:
    from moshi.models import loaders

    from ttt_moshi.lora import lora_sites
    from ttt_moshi.model import DEMO_KWARGS

    settings = {**loaders._lm_kwargs, **DEMO_KWARGS, "dim": 32, "num_heads": 2, "num_layers": 1}
    model = loaders.get_moshi_lm(None, {**settings, "cross_attention": True}, device="meta", dtype=torch.float32)
    with pytest.raises(UsageError, match="LoRA cannot reach the cross-attention at"):
        lora_sites(model, "all")


# --- the check that every plugin with LoRA must pass, and wrong plugins ---


@pytest.mark.parametrize("backbone", [TOY, MOSHI], ids=["toy", "moshi"])
def test_lora_keeps_what_its_check_asks(backbone: Any) -> None:
    CHECKS["lora"](Bench(backbone))


class ReadsTheWeight(Block):
    """Calls the first layer of its feed-forward by its weight, as kyutai's gating does."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        x = self.after_attention(x + self.dropout(self.self_attn(self.norm1(x), cache)), cache)
        hidden = nn.functional.linear(self.norm2(x), self.linear1.weight, self.linear1.bias)
        return x + self.dropout(self.linear2(nn.functional.gelu(hidden)))


class WeightsInStreams(Attention):
    """Calls its layer while it reads whole sequences, and reads the weight itself while it streams."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        if cache is None:
            return super().forward(x, cache)
        kind, self.out_proj.__class__ = type(self.out_proj), nn.Linear
        try:
            return super().forward(x, cache)
        finally:
            self.out_proj.__class__ = kind


class RenamesWeights(MakingToy):
    """Puts LoRA around a layer, so that its weight gets another name."""

    def lora_sites(self, model: nn.Module, linears: Linears) -> Sequence[LoraSite]:
        assert isinstance(model, ToyModel)
        if not isinstance(model.head, nn.Sequential):
            model.head = nn.Sequential(model.head)
        return super().lora_sites(model, linears)


class MiscountsLayers(MakingToy):
    """Says that there is a layer more than there is."""

    def lora_shapes(self, options: Any, linears: Linears) -> dict[tuple[int, int], int]:
        return {**super().lora_shapes(options, linears), (7, 7): 1}


def _with(attention: type[Attention] = Attention, block: type[Block] = Block) -> MakingToy:
    built = type("B", (block,), {"attention": attention})
    model = type("M", (ToyModel,), {"block": built})
    adapted = type("T", (ToyBackbone.adapted, built), {})
    return type("Wrong", (MakingToy,), {"model": model, "adapted": adapted})()


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        (_with(block=ReadsTheWeight), r"in training mode the loss does not depend on layers.0.linear1.lora_B.weight"),
        (_with(attention=WeightsInStreams), "with LoRA the streamed model is"),
        (RenamesWeights(), "the backbone's own parameters have other names"),
        (MiscountsLayers(), r"for all it says .*\(7, 7\): 1"),
    ],
    ids=["reads-the-weight", "weights-in-streams", "renames", "miscounts"],
)
def test_a_wrong_plugin_is_caught_by_the_check(backbone: MakingToy, told: str) -> None:
    with pytest.raises(MethodBrokenError, match=told):
        CHECKS["lora"](Bench(backbone))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("forgets to be off", "LoRA that is off has the loss"),
        ("starts with values", "LoRA that has not learned has the loss"),
        ("does nothing", "in training mode the loss does not depend on"),
    ],
)
def test_wrong_lora_is_caught_by_the_check(wrong: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LoraLinear, input: Tensor) -> Tensor:
        added = self.lora_B(self.lora_A(input)) * self.lora_scaling
        if wrong == "starts with values":
            added = added + 1e-3
        if wrong == "does nothing" or (self.lora_off and wrong != "forgets to be off"):
            return nn.functional.linear(input, self.weight, self.bias)
        return nn.functional.linear(input, self.weight, self.bias) + added

    monkeypatch.setattr(LoraLinear, "forward", forward)
    with pytest.raises(MethodBrokenError, match=told):
        CHECKS["lora"](Bench(TOY))


# --- training ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_share_is_that_of_the_product_in_the_weight(dtype: torch.dtype) -> None:
    model = TOY.build(TOY.tiny(), device="cpu", dtype=dtype)
    lora = filled(Lora(model, LoraPlan(tuple(TOY.lora_sites(model, "all")), LoraSettings(2, 2.0, "all"))))
    for path, share in lora.shares().items():
        linear = lora.linears[path]
        product = 2.0 * linear.lora_B.weight.double() @ linear.lora_A.weight.double()
        assert share == pytest.approx(float(product.norm() / linear.weight.double().norm()), rel=1e-5)


def test_a_run_of_lora_learns_saves_and_says_so(tmp_path: Path) -> None:
    asked = config(tmp_path / "run", lora={"rank": "match", "linears": "attention"})
    result, told = run(asked)
    of_ttt = layer_parameters(asked.ttt, dim=16, num_heads=2)
    rank = matched_rank({(16, 48): 2, (16, 16): 2}, of_ttt)
    assert f"LoRA of rank {rank} in 4 linears: {rank * 192:,} parameters (matched to TTT's {of_ttt:,})" in told
    assert "TTT-linear" not in told
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shares = [line["lora_share"] for line in lines if "lora_share" in line]
    assert shares == sorted(shares)
    assert shares[-1] > 0
    assert lines[-1]["layers"] == {}
    assert f"LoRA moved its linears by {shares[-1]:.3g} of their norm" in told
    evaluation = result.evaluation
    assert evaluation.loss != evaluation.loss_gates_closed
    assert f"with LoRA off {evaluation.loss_gates_closed:.4f}: LoRA " in told
    info = read_info(tmp_path / "run")
    assert (info.kind, info.sites, info.lora, info.version) == ("lora", (), LoraSettings(rank, 2.0, "attention"), 4)
    assert info.parameters == rank * 192
    learned = load_file(result.checkpoint / MODEL)
    assert all(value.count_nonzero() for value in learned.values())
    assert f"exp_avg.{next(iter(learned))}" in load_file(result.checkpoint / OPTIMIZER)


def test_the_closed_arm_is_the_plain_backbone_bit_for_bit(tmp_path: Path) -> None:
    plain = TOY.build(ToyOptions(**TINY), device="cpu", dtype=torch.float32)
    result, _ = run(config(tmp_path / "run", adapter="ttt+lora"))
    model, injection = build(config(adapter="ttt+lora"), TOY, CPU)
    load_adapter(result.checkpoint, model, injection=injection)
    tokens = torch.arange(24)[None] % 16
    with torch.no_grad(), gates_closed(model):
        assert torch.equal(model.eval()(tokens), plain(tokens))
    with torch.no_grad():
        assert not torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize(("adapter", "states"), [("lora", False), ("lora", True), ("ttt+lora", True)])
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, adapter: str, states: bool) -> None:
    settings: dict[str, Any] = {"adapter": adapter, "ttt": {"persistent_states": states}, "data": {"shuffle": False}}
    frozen_dtype = {"param_dtype": "bfloat16", "lr_schedule": "constant"}
    whole, _ = run(config(tmp_path / "whole", train=frozen_dtype, **copy.deepcopy(settings)))
    run(config(tmp_path / "cut", train={**frozen_dtype, "max_steps": 2}, **copy.deepcopy(settings)))
    went_on, _ = run(config(tmp_path / "cut", train=frozen_dtype, **copy.deepcopy(settings)), resume=True)
    for name in (MODEL, OPTIMIZER):
        one, other = load_file(whole.checkpoint / name), load_file(went_on.checkpoint / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert any("lora_A" in key for key in one)
    assert whole.loss == went_on.loss


def test_lora_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    run(config(tmp_path / "frozen", adapter="ttt+lora", train={"lora_lr_multiplier": 0.0}))
    learned = load_file(tmp_path / "frozen/checkpoints/step_000004" / MODEL)
    assert all(not value.count_nonzero() for name, value in learned.items() if "lora_B" in name)
    assert read_info(tmp_path / "frozen").lora is not None
    with pytest.raises(ConfigError, match="nothing would learn"):
        run(config(tmp_path / "none", train={"lora_lr_multiplier": 0.0}))
    run(config(tmp_path / "fast", train={"lora_lr_multiplier": 3.0, "max_steps": 1}))
    run(config(tmp_path / "slow", train={"max_steps": 1}))
    fast, slow = (load_file(tmp_path / name / "checkpoints/step_000001" / MODEL) for name in ("fast", "slow"))
    for name in slow:
        if "lora_B" in name:  # from zero, AdamW's first step is its rate
            assert torch.allclose(fast[name], 3 * slow[name], rtol=1e-4)


def test_scaling_acts_in_training_and_in_files(tmp_path: Path) -> None:
    losses = [run(config(tmp_path / str(scaling), lora={"scaling": scaling}))[0].loss for scaling in (0.5, 2.0)]
    assert losses[0] != losses[1]
    model, injection = build(config(lora={"scaling": 0.5}), TOY, CPU)
    with pytest.raises(AdapterMismatchError, match=r"lora.scaling: 2.0 in the file, 0.5 here.*--set lora.scaling=2.0"):
        load_adapter(tmp_path / "2.0", model, injection=injection)


def test_lora_that_no_gradient_reaches_ends_the_run(tmp_path: Path) -> None:
    wrong = _with(block=ReadsTheWeight)
    with pytest.raises(InactiveLayerError, match=r"layers.0.linear1.lora_A.weight: no gradient reaches this LoRA"):
        run(config(tmp_path / "run", backbone=wrong), backbone=wrong)


def test_the_attention_of_ttts_layers_alone_is_unfrozen(tmp_path: Path) -> None:
    result, _ = run(config(tmp_path / "run", adapter="ttt", train={"trainable": "ttt+ttt_layer_attention"}))
    trained = load_file(result.checkpoint / "backbone_model.safetensors")
    assert sorted(trained) == [
        f"layers.1.self_attn.{name}" for name in ("in_proj.bias", "in_proj.weight", "out_proj.bias", "out_proj.weight")
    ]
    with pytest.raises(ConfigError, match=r"ttt\+ttt_layer_attention: no layer has TTT; write ttt or all"):
        run(config(tmp_path / "none", train={"trainable": "ttt+ttt_layer_attention"}))


@pytest.mark.parametrize(
    ("path", "layer", "expected"),
    [
        ("transformer.layers.3", 3, "transformer.layers.3"),
        ("transformer_blocks.3.attn1", 3, "transformer_blocks.3"),
        ("encoder.0.layers.3.mixer", 3, "encoder.0.layers.3"),
        ("mixer", 0, "mixer"),
    ],
)
def test_a_sites_layer_is_found_in_its_path(path: str, layer: int, expected: str) -> None:
    from ttt.plugins import Site

    assert Site(layer, path, nn.Identity(), 4, 1, nn.Identity).layer_path == expected


# --- files ---


def test_an_adapter_of_lora_loads_into_a_plain_model_and_not_into_another(tmp_path: Path) -> None:
    result, _ = run(config(tmp_path / "run", adapter="ttt+lora"))
    model = TOY.build(ToyOptions(**TINY), device="cpu", dtype=torch.float32)
    with pytest.raises(AdapterMismatchError, match="holds LoRA, and no lora_sites are given"):
        load_adapter(tmp_path / "run", model, sites=TOY.sites(model))
    injection = load_adapter(tmp_path / "run", model, sites=TOY.sites(model), lora_sites=TOY.lora_sites)
    learned = load_file(result.checkpoint / MODEL)
    assert all(torch.equal(learned[name], value) for name, value in injection.state_dict().items())
    injection.eject()
    assert type(model.head) is nn.Linear
    for adapter, told in (("ttt", "ttt"), ("lora", "lora")):
        other, injection = build(config(adapter=adapter), TOY, CPU)
        with pytest.raises(AdapterMismatchError, match=f'adapter: "ttt\\+lora" in the file, "{told}" here'):
            load_adapter(tmp_path / "run", other, injection=injection)
    other, injection = build(config(adapter="ttt+lora", lora={"linears": "attention"}), TOY, CPU)
    with pytest.raises(AdapterMismatchError, match=r'lora\.linears: "all" in the file, "attention" here'):
        load_adapter(tmp_path / "run", other, injection=injection)


def test_a_file_of_lora_alone_gives_the_layers_of_ttt_their_context(tmp_path: Path) -> None:
    """Loaded as the README does it, without the config that names the layers; ejected, they see what they saw."""
    options = MOSHI.tiny().model_copy(update={"context": 7, "ttt_layer_context": 3})
    config = run_config_model(MOSHI).model_validate(
        {"backbone": options.model_dump(), "adapter": "lora", "lora": {"rank": 2}, "ttt": {"layers": [1]}}
    )
    _, injection = build(config, MOSHI, CPU)
    identity = backbone_identity(MOSHI, options)

    def contexts(model: Any) -> list[int]:
        return [layer.self_attn.context for layer in model.transformer.layers]

    def loaded(path: Path) -> Any:
        model = MOSHI.build(options, device="cpu", dtype=torch.float32)
        return load_adapter(path, model, sites=MOSHI.sites(model), lora_sites=MOSHI.lora_sites)

    path = save_adapter(tmp_path / "a", injection, backbone=identity)
    again = loaded(path)
    assert contexts(again.model) == contexts(injection.model) == [7, 3, 7]
    load_adapter(path, injection.model, injection=injection)
    undo = dict(injection._prepared)
    injection.takes_over({0: lambda: None})
    with pytest.raises(AdapterMismatchError, match=r"as those with TTT: 1 in the file, 0 here"):
        load_adapter(path, injection.model, injection=injection)
    injection.takes_over({})
    without = save_adapter(tmp_path / "b", injection, backbone=identity)
    assert contexts(loaded(without).model) != contexts(injection.model)  # what the key is for
    injection.takes_over(undo)
    for made in (injection, again):
        made.eject()
        made.eject()
        assert contexts(made.model) == [7, 7, 7]


def test_a_run_starts_from_a_run_of_lora(tmp_path: Path) -> None:
    first, _ = run(config(tmp_path / "first"))
    # TTT's settings mean nothing to LoRA alone, and may be others
    again = config(tmp_path / "again", ttt={"base_lr": 0.5}, train={"init_from": str(tmp_path / "first"), "lr": 1e-9})
    second, told = run(again)
    assert "starts from" in told
    one, other = load_file(first.checkpoint / MODEL), load_file(second.checkpoint / MODEL)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert second.evaluation.loss == pytest.approx(first.evaluation.loss, rel=1e-4)


def _lora_file(folder: Path, *, rank: int = 4, scaling: float | None = 2.0, **more: Tensor) -> Path:
    """What moshi-finetune would leave for the toy."""
    _, lora = toy_with_lora(rank=rank)
    folder.mkdir(exist_ok=True)
    tensors = {name: value.detach().clone() for name, value in filled(lora).parameters().items()}
    save_file({**tensors, **more}, folder / "lora.safetensors")
    if scaling is not None:
        (folder / "config.json").write_text(json.dumps({"lora": True, "lora_rank": rank, "lora_scaling": scaling}))
    return folder / "lora.safetensors"


def test_lora_starts_from_the_folder_of_an_adapter(tmp_path: Path) -> None:
    first, _ = run(config(tmp_path / "first", lora={"rank": 4}, train={"max_steps": 1}))
    _, told = run(config(tmp_path / "run", lora={"rank": 4, "init_from": str(first.checkpoint)}))
    assert f"LoRA starts from {first.checkpoint}" in told


@pytest.mark.parametrize("of", ["file", "folder"])
def test_lora_starts_from_a_file_of_moshi_finetune(tmp_path: Path, of: str) -> None:
    file = _lora_file(tmp_path / "consolidated")
    start = str(file if of == "file" else file.parent)
    result, told = run(config(tmp_path / "run", lora={"rank": 4, "init_from": start}, train={"lr": 1e-9}))
    assert f"LoRA starts from {start}" in told
    theirs, ours = load_file(file), load_file(result.checkpoint / MODEL)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    assert check_text(lora={"rank": 4, "init_from": start}) == []


@pytest.mark.parametrize(
    ("settings", "code", "key", "told"),
    [
        ({"rank": 8}, "TTT726", "lora.rank", "has rank 4, the config's is 8"),
        ({"rank": 4, "scaling": 1.0}, "TTT726", "lora.scaling", "a scaling of 2, the config has 1"),
        ({"rank": "match"}, None, "", "has rank 4, the config's is 2"),
        ({"rank": 4, "linears": "attention"}, None, "", "holds 10 others, as head.lora_A.weight"),
    ],
)
def test_a_file_of_lora_that_does_not_fit_is_refused(
    tmp_path: Path, settings: dict[str, Any], code: str | None, key: str, told: str
) -> None:
    settings = {**settings, "init_from": str(_lora_file(tmp_path / "theirs"))}
    found = check_text(lora=settings)
    if code is not None:
        assert [(each.code, each.path) for each in found] == [(code, key)]
        assert told in found[0].message
    with pytest.raises(ConfigError, match=r"lora.init_from: .*" + told):
        run(config(tmp_path / "run", lora=settings))
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_names_no_linear_layer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a rank is to be matched, which no count of parameters allows."""
    monkeypatch.setattr(type(TOY), "lora_sites", lambda self, model, linears: [])
    for rank in (4, "match"):
        with pytest.raises(UsageError, match=r"^lora\.linears: all: the backbone .* names no linear layer"):
            build(config(lora={"rank": rank}), TOY, CPU)


def test_lora_whose_values_are_too_large_is_what_is_blamed(tmp_path: Path) -> None:
    """Not TTT layers, of which there are none."""
    file = _lora_file(tmp_path / "theirs")
    save_file({name: value * 1e30 for name, value in load_file(file).items()}, file)
    with pytest.raises(NonFiniteError, match=r"With LoRA off the loss is \d.*, so it is LoRA: start it from other"):
        run(config(tmp_path / "run", lora={"rank": 4, "init_from": str(file)}))


def test_an_older_name_whose_tensor_cannot_be_split_is_told() -> None:
    """The depformer's attention has eight steps in one tensor; the name stays, and is then named as unknown."""
    from ttt_moshi.lora import read_lora

    model, _ = moshi_with_lora("all")
    odd = "depformer.layers.0.self_attn.in_proj.lora_A.weight"
    assert list(read_lora(model, {odd: torch.zeros(9, 64)})) == [odd]


def test_a_file_that_is_no_lora_is_told_what_it_is(tmp_path: Path) -> None:
    embeddings = _lora_file(tmp_path / "embeddings", **{"emb.0.weight": torch.zeros(2, 2)})
    save_file({"text_emb.weight": torch.zeros(2, 2)}, tmp_path / "weights.safetensors")
    run(config(tmp_path / "both", adapter="ttt+lora"))
    for path, told in (
        (tmp_path / "gone.safetensors", "gone.safetensors"),
        (tmp_path / "both", "holds neither lora.safetensors nor adapter_model.safetensors; name the file, or start"),
        (embeddings, "holds 1 tensor that is not LoRA (emb.0.weight); embeddings that learned too"),
        (tmp_path / "weights.safetensors", "no LoRA: none of its tensors"),
        (tmp_path / "both/checkpoints/step_000004" / MODEL, "start from it with train.init_from"),
    ):
        found = check_text(lora={"rank": 4, "init_from": str(path)})
        assert [(each.code, each.path) for each in found] == [("TTT725", "lora.init_from")]
        assert told in found[0].message


def test_moshis_older_names_and_the_server_of_kyutai(tmp_path: Path) -> None:
    """`in_proj` and `out_proj` hold all steps in one tensor; kyutai's own loader reads what is exported."""
    from moshi.models import loaders
    from moshi.modules.lora import LoRALinear

    from ttt_moshi.lora import export_lora, read_lora
    from ttt_moshi.model import DEMO_KWARGS

    model, lora = moshi_with_lora("all")
    now = {name: value.detach() for name, value in filled(lora).parameters().items()}
    older: dict[str, Tensor] = {}
    for name, value in now.items():
        before, _, after = name.partition("_projs.")
        key = name if not after else f"{before}_proj.{after.partition('.')[2]}"
        older[key] = torch.cat([older[key], value]) if key in older else value
    renamed = read_lora(model, older)
    assert renamed.keys() == now.keys()
    assert all(torch.equal(renamed[name], now[name]) for name in now)

    plain = MOSHI.build(MOSHI.tiny(), device="cpu", dtype=torch.float32)
    settings = LoraSettings(2, 2.0, "all")
    sites = MOSHI.lora_sites(plain, "all")  # type: ignore[attr-defined]
    injection = inject.apply(
        plain,
        MOSHI.sites(plain),
        RunConfig.model_validate({"backbone": {"name": "moshi"}, "adapter": "lora"}).injected,
        lora=LoraPlan(tuple(sites), settings),
    )
    injection.load_state_dict(now)
    save_adapter(tmp_path, injection, backbone={"name": "moshi"})
    structure = {**loaders._lm_kwargs, **DEMO_KWARGS, "dim": 32, "num_heads": 2, "num_layers": 3}
    written = export_lora(tmp_path, tmp_path / "out", model_config=structure)
    assert [file.name for file in written] == ["lora.safetensors", "config.json"]
    kwargs = json.loads(written[1].read_text())
    weights = tmp_path / "model.safetensors"
    save_file({name: v for name, v in plain.state_dict().items() if "lora" not in name}, weights)
    served = loaders.get_moshi_lm(
        weights, kwargs, device="cpu", dtype=torch.float32, lora_weights=written[0], fuse_lora=False
    )
    assert sum(isinstance(each, LoRALinear) for each in served.modules()) == len(sites)
    codes = MOSHI.example_batch(plain, batch_size=1, tokens=5, seed=0)
    for found, expected in zip(moshi_outputs(served, codes), moshi_outputs(plain, codes), strict=True):
        assert torch.equal(found, expected)


# --- ttt check ---


def check_text(adapter: str = "lora", backbone: Any = TOY, **sections: Any) -> list[Any]:
    content = {"backbone": TINY, "adapter": adapter, **sections}
    checked = check_config(None, text=json.dumps(content), backbone=backbone)
    return [each for each in checked.findings if each.code.startswith("TTT72") or each.severity.name == "ERROR"]


@pytest.mark.parametrize(
    ("content", "codes"),
    [
        ({"adapter": "lora"}, []),
        ({"adapter": "ttt+lora", "ttt": {"layers": "none"}}, ["TTT722"]),
        ({"adapter": "lora", "ttt": {"layers": "none"}}, []),
        ({"adapter": "lora", "ttt": {"layers": "none"}, "lora": {"rank": "match"}}, ["TTT723"]),
        ({"adapter": "ttt", "lora": {"rank": 3}}, ["TTT724"]),
        ({"adapter": "ttt", "train": {"lora_lr_multiplier": 2.0}}, ["TTT724"]),
        ({"adapter": "ttt", "lora": {"rank": 64}}, []),  # as a run's own config has it
        ({"adapter": "lora", "train": {"trainable": "ttt+ttt_layer_attention"}}, ["TTT722"]),
        ({"adapter": "ttt+lora", "train": {"trainable": "ttt+ttt_layer_attention"}}, []),
        ({"adapter": "lora", "lora": {"rank": 17}}, ["TTT727"]),
        ({"adapter": "lora", "lora": {"rank": 0}}, ["TTT102"]),
        ({"adapter": "lora", "lora": {"linears": "heads"}}, ["TTT103"]),
        ({"adapter": "both"}, ["TTT103"]),
        ({"adapter": None}, ["TTT103"]),
    ],
)
def test_the_check_says_what_does_not_act(content: dict[str, Any], codes: list[str]) -> None:
    sections = {"lora": {"rank": 2}, **content} if content.get("adapter") not in ("ttt", None) else content
    assert [each.code for each in check_text(**sections)] == codes


def test_a_backbone_without_lora_says_so(tmp_path: Path) -> None:
    (found,) = check_text(backbone=ToyBackbone(), lora={"rank": 2})
    assert (found.code, found.path) == ("TTT721", "adapter")
    assert found.message == "the backbone toy has no LoRA: its linear layers are not known"
    with pytest.raises(UsageError, match="the backbone toy has no LoRA: its linear layers are not known"):
        run(config(tmp_path / "run", backbone=ToyBackbone()), backbone=ToyBackbone())


def test_a_rank_is_matched_to_the_nearest_count_and_the_check_says_the_runs() -> None:
    assert matched_rank({(3, 5): 2}, 100) == 6  # 96, and 7 would be 112
    assert matched_rank({(3, 5): 2}, 105) == 7
    assert matched_rank({(3, 5): 2}, 1) == 1
    assert lora_parameters({(3, 5): 2, (1, 1): 1}, 4) == 72
    for linears in ("all", "attention"):
        asked = config(lora={"rank": "match", "linears": linears}, adapter="ttt+lora")
        _, injection = build(asked, TOY, CPU)
        assert injection.lora is not None
        of_ttt = sum(p.numel() for each in injection.adapters.values() for p in each.parameters())
        of_lora = sum(p.numel() for p in injection.lora_parameters.values())
        assert injection.lora.matched_to == of_ttt
        needs = estimate(asked, TOY.facts(asked), TOY.lora_shapes(asked.backbone, linears))
        assert (needs.lora_rank, needs.lora_parameters) == (injection.lora.settings.rank, of_lora)
        one_more = lora_parameters(TOY.lora_shapes(asked.backbone, linears), injection.lora.settings.rank + 1)
        one_less = lora_parameters(TOY.lora_shapes(asked.backbone, linears), injection.lora.settings.rank - 1)
        assert abs(of_lora - of_ttt) <= min(abs(one_more - of_ttt), abs(one_less - of_ttt))
        without = estimate(asked.model_copy(update={"adapter": "ttt"}), TOY.facts(asked))
        assert needs.adapter_bytes - without.adapter_bytes == 4 * of_lora
        assert needs.checkpoint_bytes - without.checkpoint_bytes == 3 * 4 * of_lora


def test_moshis_rank_is_told_without_building_it() -> None:
    text = (
        "backbone: {name: moshi, preset: 7b, random_weights: true}\nadapter: lora\n"
        "ttt: {layers: [29, 30, 31]}\nlora: {rank: match}\ndata: {train_data: x.jsonl}\n"
    )
    found = [each for each in check_config(None, text=text, cost=True).findings if each.code == "TTT405"]
    assert "LoRA of rank 71 in 337 linears: 215,149,312 parameters (matched to TTT's 214,474,848)" in found[0].message
    assert found[0].value["lora"] == {"rank": 71, "parameters": 215_149_312}
