"""The closed forms of what a run costs, against what the running model keeps, counts and writes."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ttt.ops.minibatch
import ttt.ops.select
from ttt import inject
from ttt.adapter import TTTAdapter
from ttt.amounts import parse_bytes, show_bytes, show_flops
from ttt.check import check_config, load_config
from ttt.check.estimate import estimate
from ttt.config import RunConfig, TTTConfig
from ttt.costs import layer_activation_bytes, layer_flops, layer_parameters, recorded_bytes, scan_cost
from ttt.errors import UsageError
from ttt.layer import TTTLayer
from ttt.ops.fused import layout, operator
from ttt.ops.rotary import rotary_angles
from ttt.parallel.layout import Layout
from ttt.plugins import BackboneFacts, get_backbone
from ttt.train.learnable import choose_learnable
from ttt.train.optim import Optimizer
from ttt_cli.check_files import parse_memory

MOSHI = get_backbone("moshi")


def _ttt(**settings: Any) -> TTTConfig:
    return TTTConfig.model_validate({**MOSHI.ttt_defaults, **settings})


def _config(**sections: dict[str, Any]) -> RunConfig:
    text = "backbone: {name: moshi, preset: demo}"
    overrides = [f"{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()]
    return load_config(None, text=text, overrides=overrides).config


# --- amounts ---


SIZES = {
    **dict.fromkeys(("80GiB", "80 gib", "80G", " 80g "), 80 << 30),
    **dict.fromkeys(("24GB", "24 GB", "24gb"), 24 * 10**9),
    **dict.fromkeys(("0.5gib", "512MiB", "512M"), 1 << 29),
    **{"1.5 MiB": 3 << 19, "1.5TB": 15 * 10**11, "512B": 512, "2KiB": 2048, "3P": 3 << 50},
}
NO_SIZES = ("", "GiB", "-1GiB", "0", "0GiB", "0.1B", "80", "80 GiBs", "80;", "1e9", "1e9B", "nan", "all", "８G")


@pytest.mark.parametrize("text", SIZES)
def test_sizes_as_people_write_them(text: str) -> None:
    """The same in Python and on the command line."""
    assert parse_bytes(text) == parse_memory(text) == SIZES[text]


@pytest.mark.parametrize("text", [*NO_SIZES, f"{'9' * 400}GiB", f"1.{'0' * 5000}GiB"], ids=lambda text: text[:9])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^`.*` is not a size; write 80GiB$") as refused:
        parse_bytes(text)
    assert len(str(refused.value)) < 100
    with pytest.raises(UsageError, match=r"^--memory: `.*` is not a size; write 80GiB$"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        *((0, "0 bytes"), (1, "1 byte"), (1023, "1023 bytes"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 20, "1 MiB")),
        *((24e9, "22.4 GiB"), (80 << 30, "80 GiB"), (1023 << 20, "0.999 GiB"), (1.5 * 2**40, "1.5 TiB")),
        *((5 << 60, "5 EiB"), (1 << 80, "1 YiB"), (1 << 90, "more than 10^12 TiB")),
    ],
)
def test_sizes_are_shown_in_binary_units(count: float, words: str) -> None:
    assert show_bytes(count) == words
    if count and "than" not in words:  # it can be read again
        assert parse_bytes(words.replace("bytes", "B").replace("byte", "B")) == pytest.approx(count, rel=5e-3)


# --- measuring ---


class Kept:
    """Storages that autograd keeps, parameters apart, each counted once."""

    def __init__(self, known: set[int]) -> None:
        self.known = known
        self.sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.known:
            self.sizes[pointer] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor)  # so that no other storage gets its address
        return tensor

    def total(self) -> int:
        return sum(self.sizes.values())


@contextlib.contextmanager
def _kept(*known: Tensor) -> Iterator[Kept]:
    kept = Kept({tensor.untyped_storage().data_ptr() for tensor in known})
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        yield kept


@contextlib.contextmanager
def _scans_measured(found: list[Kept], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, what each scan keeps beside its inputs goes to `found`."""
    scan = ttt.ops.minibatch.fused_scan

    def measured(weights: tuple[Tensor, ...], *inputs: Tensor, **more: Any) -> Any:
        with _kept(*weights, *inputs) as kept:
            out = scan(weights, *inputs, **more)
        found.append(kept)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(ttt.ops.minibatch, "fused_scan", measured)
        yield


SETTINGS = [
    # layer_type, group size, windows of how many tokens, mini-batch size, streams, more
    ("linear", 0, 64, 16, 1, {}),
    ("linear", 4, 192, 16, 2, {}),
    ("linear", 1, 96, 8, 3, {}),
    ("mlp", 0, 188, 16, 2, {}),
    ("mlp", 2, 188, 16, 2, {}),
    ("mlp", 5, 188, 8, 1, {}),
    ("mlp", 16, 188, 4, 2, {}),
    ("mlp", 3, 128, 1, 2, {}),
    ("mlp", 4, 256, 32, 1, {"mlp_layers": 3}),
    ("mlp", 0, 64, 16, 2, {"mlp_hidden_dims": [24, 40], "mlp_layers": 3, "learnable_token_idx": True}),
    ("linear", 0, 64, 16, 1, {"learnable_token_idx": True, "normalize_qk": False}),
    ("mlp", 0, 60, 16, 2, {"causal": False, "rope": "none"}),
]


@pytest.mark.parametrize(("kind", "group", "tokens", "size", "batch", "more"), SETTINGS)
def test_what_the_scan_keeps_between_forward_and_backward(
    kind: str, group: int, tokens: int, size: int, batch: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _ttt(layer_type=kind, scan_checkpoint_group_size=group, mini_batch_size=size, **more)
    adapter = TTTAdapter(128, 4, config)
    found: list[Kept] = []
    with _scans_measured(found, monkeypatch):
        adapter(torch.randn(batch, tokens, 128, requires_grad=True))
    (kept,) = found
    cost = scan_cost(config, dim=128, num_heads=4, tokens=tokens, batch_size=batch)
    assert kept.total() == pytest.approx(cost.kept_bytes - cost.outside_bytes, rel=0.1, abs=cost.carry_bytes / 100)
    if not cost.keeps_everything:
        assert kept.total() == cost.carries_kept_bytes == (cost.groups - 1) * cost.carry_bytes


@pytest.mark.parametrize(("kind", "group", "tokens", "size", "batch", "more"), [s for s in SETTINGS if s[1]])
def test_what_a_group_makes_room_for(
    kind: str, group: int, tokens: int, size: int, batch: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What backward makes room for: its mini-batches' weights and activations, their tokens, and what runs them."""
    config = _ttt(layer_type=kind, scan_checkpoint_group_size=group, mini_batch_size=size, **more)
    adapter = TTTAdapter(128, 4, config)
    out = adapter(torch.randn(batch, tokens, 128, requires_grad=True))
    found: dict[int, Tensor] = {}

    def noticed(make: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            made = make(*arguments)
            leaves = torch.utils._pytree.tree_leaves(vars(made) if hasattr(made, "__dict__") else tuple(made))
            found.update({x.data_ptr(): x for x in leaves})
            return made

        return run

    with monkeypatch.context() as patch:
        for name in ("Scratch", "BackwardScratch"):
            patch.setattr(operator, name, noticed(getattr(operator, name)))
        for made_by in (layout.Block, layout.Kept):
            patch.setattr(made_by, "room", noticed(made_by.room))
        out.square().sum().backward()
    cost = scan_cost(config, dim=128, num_heads=4, tokens=tokens, batch_size=batch)
    assert sum(x.nbytes for x in found.values()) == pytest.approx(cost.passing_bytes, rel=0.05)


def test_what_a_layer_keeps_around_its_scan() -> None:
    for settings in ({}, {"normalize_qk": False}, {"normalize_target": False, "input_norm": "none"}):
        config = _ttt(layer_type="linear", scan_checkpoint_group_size=1, mini_batch_size=16, **settings)
        adapter = TTTAdapter(256, 4, config)
        with _kept(*adapter.parameters()) as kept:
            adapter(torch.randn(2, 64, 256, requires_grad=True))
        shape = {"dim": 256, "num_heads": 4, "tokens": 64, "batch_size": 2}
        around = kept.total() - scan_cost(config, **shape).kept_bytes
        assert around == pytest.approx(layer_activation_bytes(config, **shape), rel=0.1)


def test_what_a_mini_batch_left_open_keeps() -> None:
    config = _ttt(layer_type="mlp", scan_checkpoint_group_size=2, mini_batch_size=16)
    adapter = TTTAdapter(128, 4, config)
    totals = []
    for tokens in (64, 76):
        with _kept(*adapter.parameters()) as kept:
            adapter(torch.randn(2, tokens, 128, requires_grad=True))
        totals.append(kept.total())
    shape = {"dim": 128, "num_heads": 4, "batch_size": 2}
    costs = [scan_cost(config, tokens=tokens, **shape) for tokens in (64, 76)]
    around = [layer_activation_bytes(config, tokens=tokens, **shape) for tokens in (64, 76)]
    assert costs[0].outside_bytes == 0
    assert totals[1] - totals[0] == pytest.approx(costs[1].outside_bytes + around[1] - around[0], rel=0.1)


@pytest.mark.parametrize("group", [0, 2])
def test_a_layer_that_scans_twice_keeps_both(group: int) -> None:
    """One layer over a sequence and over its reverse: what autograd keeps of both, and what the estimate says."""
    ttt = _ttt(
        preset="video",
        layer_type="mlp",
        mini_batch_size=16,
        scan_checkpoint_group_size=group,
        learnable_token_idx=False,
    )
    layer = TTTLayer(128, 4, ttt)
    x, rotary = (
        torch.randn(2, 96, 128, requires_grad=True),
        rotary_angles(torch.arange(96), 32, theta=1e4, dtype=torch.float32),
    )
    with _kept(*layer.parameters(), *rotary) as kept:
        forward = layer(x, rotary=rotary)[0]
        layer(forward.flip(1), rotary=(rotary[0].flip(0), rotary[1].flip(0)))
    facts = BackboneFacts(dim=128, num_heads=4, num_layers=3, tokens_per_window=96, checkpoints_around_scans=(0, 0))
    config = _config(train={"batch_size": 2}).model_copy(update={"ttt": ttt})
    one = estimate(config, facts).parts
    passing = scan_cost(ttt, dim=128, num_heads=4, tokens=96, batch_size=2).passing_bytes
    counted = (one["carries"] + one["TTT activations"] - passing) / 3
    assert kept.total() == pytest.approx(counted, rel=0.1)


def test_checkpoints_around_a_scan_decide_how_many_layers_insides_wait() -> None:
    config = _config(ttt={"layer_type": "mlp", "layers": "all", "scan_checkpoint_group_size": 2})

    def waiting(*scans: int, gradient_checkpointing: bool = False) -> tuple[int, int]:
        train = config.train.model_copy(update={"gradient_checkpointing": gradient_checkpointing})
        facts = BackboneFacts(
            dim=64, num_heads=4, num_layers=5, tokens_per_window=96, checkpoints_around_scans=scans or None
        )
        needs = estimate(config.model_copy(update={"train": train}), facts)
        assert needs.scans == (scans or (int(gradient_checkpointing),))
        assert needs.scan is not None
        return needs.parts["carries"], needs.parts["TTT activations"] - needs.scan.passing_bytes

    carries, around = waiting(0)
    assert waiting(0, 0) == (2 * carries, 2 * around)
    assert waiting(1) == waiting(gradient_checkpointing=True) == (carries // 5, around // 5)
    assert waiting(1, 2) == (2 * carries // 5, 2 * around // 5)  # of one layer at a time
    assert waiting(0, 1) == (6 * carries // 5, 6 * around // 5)


# --- counting ---


@pytest.mark.parametrize("group", [0, 1, 3, 4, 8, 16])
@pytest.mark.parametrize("enclosing", [0, 1, 2])
def test_how_often_every_inner_step_runs_forward(group: int, enclosing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _ttt(layer_type="linear", scan_checkpoint_group_size=group, mini_batch_size=4)
    layer: Callable[[Tensor], Tensor] = TTTAdapter(16, 2, config)
    for _ in range(enclosing):
        layer = _checkpointed(layer)
    runs = 0
    chunk = operator.forward_chunk

    def counted(common: Any, views: Any, *others: Any, **keywords: Any) -> Any:
        nonlocal runs
        runs += views.steps
        return chunk(common, views, *others, **keywords)

    monkeypatch.setattr(operator, "forward_chunk", counted)
    layer(torch.randn(1, 32, 16, requires_grad=True)).sum().backward()
    cost = scan_cost(config, dim=16, num_heads=2, tokens=32, batch_size=1)
    assert cost.steps == 8
    assert runs == 8 * cost.forwards(enclosing=enclosing)


def _checkpointed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # What follows the inner checkpoint needs its output, as a layer's feed-forward does: so it runs again each time.
    return lambda x: torch.utils.checkpoint.checkpoint(lambda x: function(x).sin(), x, use_reentrant=False)


@pytest.mark.parametrize("steps", [1, 2, 7, 12, 100, 1000])
def test_the_best_group_is_the_best_of_all(steps: int) -> None:
    cost = scan_cost(_ttt(mini_batch_size=16), dim=128, num_heads=4, tokens=16 * steps, batch_size=2)
    best = cost.best_group_size()
    peaks = {size: cost.with_group_size(size).peak_bytes for size in range(steps + 1)}
    assert peaks[best] == min(peaks.values())
    if steps >= 100:
        state, activations = cost.carry_bytes, cost.activation_bytes
        assert best == pytest.approx((steps * state / (state + activations)) ** 0.5, rel=0.5)


@pytest.mark.parametrize("tokens", [5, 96, 188, 4096])
def test_auto_is_the_best_group_of_the_config_and_of_the_layer(tokens: int) -> None:
    config = _ttt(layer_type="mlp", mini_batch_size=4, scan_checkpoint_group_size="auto")
    cost = scan_cost(config, dim=128, num_heads=4, tokens=tokens, batch_size=3)
    assert cost.group_size == cost.best_group_size()
    assert TTTLayer(128, 4, config, device="meta")._group_size(tokens) == cost.group_size
    written = _config(ttt={"scan_checkpoint_group_size": "auto", "mini_batch_size": 4}).ttt
    assert written.scan_checkpoint_group_size == "auto"


def test_auto_runs_as_the_group_that_it_comes_to() -> None:
    config = _ttt(layer_type="mlp", mini_batch_size=4, scan_checkpoint_group_size="auto")
    layer = TTTLayer(32, 2, config)
    x = torch.randn(2, 101, 32, requires_grad=True)
    with _kept(*layer.parameters()) as kept:
        y, _ = layer(x)
    size = layer._group_size(101)
    assert 1 < size < 25
    same = TTTLayer(32, 2, config.model_copy(update={"scan_checkpoint_group_size": size}))
    same.load_state_dict(layer.state_dict())
    with _kept(*same.parameters()) as expected:
        assert torch.equal(y, same(x)[0])
    assert kept.total() == expected.total()


def test_what_auto_comes_to_is_told() -> None:
    text = "backbone: {name: moshi, preset: demo}\nttt: {scan_checkpoint_group_size: auto, mini_batch_size: 1}\n"
    checked = check_config("c.yaml", text=text, cost=True)
    (finding,) = [finding for finding in checked.findings if finding.code == "TTT405"]
    size = finding.value["scan_checkpoint_group_size"]
    assert size > 1
    assert f"scan_checkpoint_group_size: auto is {size} here" in finding.message
    assert {finding.code for finding in checked.findings} == {"TTT405"}
    misspelt = check_config("c.yaml", text=text.replace("auto", "automatic")).findings
    assert [(finding.code, finding.path) for finding in misspelt] == [("TTT102", "ttt.scan_checkpoint_group_size")]


# --- parameters and files ---


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_type": "linear"},
        {"layer_type": "mlp", "mlp_layers": 3, "num_heads": 8},
        {"qkvo_bias": False, "learnable_token_idx": True},
    ],
)
def test_parameters_of_a_layer(settings: dict[str, Any]) -> None:
    config = _ttt(**settings)
    adapter = TTTAdapter(64, 4, config, device="meta")
    assert layer_parameters(config, dim=64, num_heads=4) == sum(p.numel() for p in adapter.parameters())


def test_three_layers_in_moshi_7b() -> None:
    assert 3 * layer_parameters(_ttt(), dim=4096, num_heads=32) == 214_474_848


def test_a_layer_that_is_split_is_whole_for_a_moment() -> None:
    """Of Moshi 7B: the depth transformer, embeddings and heads, and one layer, as the built model has them."""
    checked = check_config(None, text=MOSHI.presets()["7b"], training=False).config
    assert checked is not None
    options = MOSHI.options.model_validate({"name": "moshi", "preset": "7b", "random_weights": True})
    model = MOSHI.build(options, device="meta", dtype=torch.bfloat16)
    layer = sum(p.numel() for p in model.get_submodule(MOSHI.sites(model)[0].path).parameters())
    facts = MOSHI.facts(checked)
    assert facts.layer_parameters == layer
    outside = sum(p.numel() for p in model.parameters()) - 32 * layer
    needs = estimate(checked, facts, None, Layout(shard=8))
    adapter = 4 * needs.numbers.adapter // 3
    assert needs.parts["gathered parameters"] == 2 * (outside + layer) + adapter


@pytest.mark.parametrize("trainable", ["ttt", "ttt+attention", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_models_parameters_and_checkpoints(trainable: str, dtype: str) -> None:
    config = _config(train={"trainable": trainable, "param_dtype": dtype}, ttt={"layers": "middle"})
    model = MOSHI.build(config.backbone, device="cpu", dtype=getattr(torch, dtype))
    facts = MOSHI.facts(config)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.attention_parameters == sum(p.numel() for n, p in model.named_parameters() if MOSHI.is_attention(n))
    layer = model.get_submodule(MOSHI.sites(model)[0].path)
    assert facts.layer_parameters == sum(p.numel() for p in layer.parameters())
    injection = inject.apply(model, MOSHI.sites(model), config.ttt, causal=True)
    learnable = choose_learnable(model, injection, config.train, is_attention=MOSHI.is_attention)
    needs = estimate(config, facts)
    assert needs.complete
    assert needs.adapter_bytes == sum(t.numel() * t.element_size() for t in injection.state_dict().values())
    assert needs.parts["parameters"] == sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = Optimizer(learnable, config.train)
    assert needs.parts["optimizer"] == pytest.approx(optimizer.nbytes(), rel=0.001)  # it also counts steps
    assert "averages" not in needs.parts
    written = optimizer.nbytes() + needs.adapter_bytes
    written += sum(e.parameter.numel() * e.parameter.element_size() for e in learnable if e.role == "backbone")
    assert needs.checkpoint_bytes == pytest.approx(written, rel=0.001)
    averaging = config.train.model_copy(update={"ema_decay": 0.999})
    averaged, more = estimate(config.model_copy(update={"train": averaging}), facts), Optimizer(learnable, averaging)
    assert averaged.parts["averages"] == more.nbytes() - optimizer.nbytes() == averaged.low - needs.low
    in_files = 2 * (written - optimizer.nbytes()) + more.nbytes()
    assert averaged.checkpoint_bytes == pytest.approx(in_files, rel=0.001)


def test_cuda_graphs_count_where_a_run_may_have_them() -> None:
    facts = MOSHI.facts(_config())
    auto, cuda, cpu, off = (
        estimate(_config(train=train), facts)
        for train in ({}, {"device": "cuda"}, {"device": "cpu"}, {"cuda_graphs": "off"})
    )
    assert auto == cuda
    assert cpu == off
    assert "CUDA graphs" not in off.parts
    assert 0 < auto.parts["CUDA graphs"] == auto.high - off.high
    assert auto.low == off.low
    assert auto.scan is not None
    tokens = 4 * (facts.tokens_per_window or 0) * facts.dim
    assert auto.parts["CUDA graphs"] == recorded_bytes(auto.scan, tokens * _config().train.batch_size)
    large = _config(train={"batch_size": 4096})  # such scans are not recorded
    assert "CUDA graphs" not in estimate(large, facts).parts


def test_what_is_not_known_is_not_made_up() -> None:
    config = _config()
    facts = BackboneFacts(dim=128, num_heads=4, num_layers=4)
    needs = estimate(config, facts)
    assert not needs.complete
    assert needs.scan is None
    assert needs.parts["backbone activations"] == 0
    assert needs.adapter_bytes > 0


# --- the whole peak ---


def _peak(work: Callable[[], object]) -> int:
    """The most that PyTorch's CPU allocator had given out at once while something ran, less what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


PEAKS = [
    {"ttt.scan_checkpoint_group_size": 2},
    {"ttt.scan_checkpoint_group_size": 4, "ttt.mini_batch_size": 4, "train.batch_size": 4, "data.duration_sec": 6},
    {"ttt.scan_checkpoint_group_size": 5, "ttt.mini_batch_size": 8, "data.duration_sec": 10, "ttt.layers": "all"},
    {"train.gradient_checkpointing": "true", "ttt.layers": "all", "data.duration_sec": 6},
    {"train.trainable": "ttt", "ttt.layer_type": "linear", "ttt.base_lr": 1.0},
    {"train.param_dtype": "bfloat16", "train.trainable": "ttt+attention", "data.duration_sec": 3},
]


@pytest.mark.parametrize("settings", PEAKS, ids=str)
def test_a_training_step_stays_in_the_printed_range(settings: dict[str, Any]) -> None:
    low, peak, high = _estimated_and_measured(settings)
    assert low <= peak <= high


LONG = {"backbone.context": 8, "data.duration_sec": 15, "ttt.layers": "[3]", "train.batch_size": 1}


@pytest.fixture
def long_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes 188 frames a long window: attention in blocks of 16, logits of 16 frames at a time."""
    for name, value in (("LONG_WINDOW", 100), ("HEAD_ROWS", 16), ("attention_block", lambda context: 16)):
        for module in ("heads", "long_windows", "memory", "model"):
            place = importlib.import_module(f"ttt_moshi.{module}")
            if hasattr(place, name):
                monkeypatch.setattr(place, name, value)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_long_window_stays_in_the_printed_range(long_windows: None, checkpointing: str) -> None:
    low, peak, high = _estimated_and_measured({**LONG, "train.gradient_checkpointing": checkpointing})
    assert low <= peak <= high


def test_a_long_window_whose_logits_exist_at_once_does_not(long_windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_moshi.model.LONG_WINDOW", 3000)
    _, peak, high = _estimated_and_measured(LONG)
    assert peak > high


def _estimated_and_measured(settings: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of a training step of the demo: estimated at least, measured, and estimated at most."""
    text, settings = MOSHI.presets()["demo"], {"train.device": "cpu", **settings}
    config = load_config(None, text=text, overrides=[f"{key}={value}" for key, value in settings.items()]).config
    facts = MOSHI.facts(config)
    needs = estimate(config, facts)
    dtype = getattr(torch, config.train.param_dtype)
    model = MOSHI.build(config.backbone, device="cpu", dtype=dtype)
    injection = inject.apply(model, MOSHI.sites(model), config.ttt, causal=True)
    MOSHI.set_gradient_checkpointing(model, config.train.gradient_checkpointing)
    learnable = choose_learnable(model, injection, config.train, is_attention=MOSHI.is_attention)
    optimizer = Optimizer(learnable, config.train)
    assert facts.tokens_per_window is not None
    batch = MOSHI.example_batch(model, batch_size=config.train.batch_size, tokens=facts.tokens_per_window, seed=0)

    def step() -> None:
        MOSHI.loss(model, batch, config).loss.backward()
        optimizer.collect()
        optimizer.clip()
        optimizer.step(0)

    step()  # moments are there from the second on
    tensors: list[Tensor] = [*nn.ParameterList(model.parameters()), *optimizer.tensors().values()]
    held = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())
    peak = held + _peak(step)
    return needs.low, peak, needs.high


# --- autocast ---


def test_autocast_adds_the_weights_as_they_were_cast() -> None:
    """Backward keeps a bfloat16 copy of each matrix: what PyTorch saves, against the closed form."""
    layers = nn.Sequential(*(nn.Linear(48, 48) for _ in range(5))).requires_grad_(False)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.shape == (48, 48):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    x = torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layers(x).sum().backward()
    parameters = 5 * 48 * 48
    facts = BackboneFacts(48, 4, 5, 100, "", parameters, parameters, layer_activation_bytes=9, head_activation_bytes=7)
    config = _config(ttt={"layers": "all"})

    def activations(**train: Any) -> int:
        changed = config.train.model_copy(update=train)
        return estimate(config.model_copy(update={"train": changed}), facts).parts["backbone activations"]

    assert activations(autocast="bfloat16") - activations() == sum(kept.values()) == 2 * parameters
    one_layer = activations(autocast="bfloat16", gradient_checkpointing=True) - activations(gradient_checkpointing=True)
    assert one_layer == 2 * parameters // 5
    half = {"param_dtype": "bfloat16"}
    assert activations(autocast="bfloat16", **half) == activations(**half)


# --- arithmetic ---

INNER_MODELS = {
    "linear": {"layer_type": "linear"},
    "mlp": {},
    "three layers": {"mlp_layers": 3},
    "uneven": {"mlp_layers": 3, "mlp_hidden_dims": [24, 40]},
    "non-causal": {"causal": False, "rope": "none"},
}


def _counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("inner", "tokens", "size", "batch"),
    [
        *((inner, 70, 16, 2) for inner in INNER_MODELS),
        *((inner, 13, 16, 2) for inner in INNER_MODELS),
        *(("linear", 64, 16, 1), ("mlp", 64, 16, 3), ("uneven", 48, 8, 2), ("non-causal", 48, 8, 2)),
    ],
)
def test_operations_are_those_that_pytorch_counts(
    inner: str, tokens: int, size: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the layer itself, through operations that the counter sees into."""
    monkeypatch.setenv("TTT_OPS", "generic")
    config = _ttt(**INNER_MODELS[inner], mini_batch_size=size, scan_checkpoint_group_size=0)
    layer = TTTLayer(64, 4, config)
    x = torch.randn(batch, tokens, 64, requires_grad=True)
    flops = layer_flops(config, dim=64, num_heads=4, tokens=tokens, batch_size=batch)
    assert _counted(lambda: layer(x)) == flops.forward
    if tokens < 4 * size:
        return
    # The last mini-batch's update is nobody's, so that backward has a little less to do.
    trained = _counted(lambda: layer(x)[0].sum().backward())
    assert trained == pytest.approx(flops.training(1), rel=0.04)
    grouped = TTTLayer(64, 4, config.model_copy(update={"scan_checkpoint_group_size": 2}))
    again = _counted(lambda: grouped(x)[0].sum().backward())
    assert again == pytest.approx(flops.training(2), rel=0.04)
    assert again - trained == pytest.approx(flops.scan, rel=0.1)

    def checkpointed() -> None:  # the kind that does not stop short of the output's projection, as it may here alone
        answer = checkpoint(lambda tokens: grouped(tokens)[0], x, use_reentrant=True)
        assert isinstance(answer, Tensor)
        answer.sum().backward()

    assert _counted(checkpointed) == pytest.approx(flops.training(3, enclosing=1), rel=0.04)


def test_a_run_multiplies_in_every_layer_and_scan() -> None:
    config = _config(ttt={"layers": "[0, 2]", "scan_checkpoint_group_size": 2}, train={"batch_size": 3})
    one = layer_flops(config.ttt, dim=128, num_heads=4, tokens=188, batch_size=3)
    facts = BackboneFacts(128, 4, 4, 188)
    needs = estimate(config, facts)
    assert (needs.forward_flops, needs.training_flops) == (2 * one.forward, 2 * one.training(2))
    twice = estimate(config, replace(facts, checkpoints_around_scans=(0, 1)))
    assert twice.forward_flops == 4 * one.forward
    assert twice.training_flops == 2 * (one.training(2) + one.training(3, enclosing=1))
    unknown = estimate(config, replace(facts, tokens_per_window=None))
    assert unknown.forward_flops == 2 * layer_flops(config.ttt, dim=128, num_heads=4, tokens=16, batch_size=3).forward


def test_operations_for_people() -> None:
    assert [show_flops(n) for n in (0, 999, 1000, 999_499, 999_500, 1.234e12, 4e18, 1e30)] == [
        *("0 FLOP", "999 FLOP", "1 kFLOP", "999 kFLOP", "1 MFLOP", "1.23 TFLOP", "4 EFLOP", "more than 10^24 FLOP")
    ]
