"""`ttt check --devices`: what each layout of several devices needs and sends, and what to write."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import yaml

from ttt.check import check_config
from ttt.check.estimate import estimate, outside_layers
from ttt.check.layouts import divided_rows, needs_of_layout, needs_of_layouts, possible_layouts, proposal, with_keys
from ttt.check.rules.layouts import in_one_line
from ttt.config import RunConfig
from ttt.config.findings import Finding, Severity
from ttt.parallel.layout import Layout
from ttt.plugins import BackboneFacts, get_backbone
from ttt_cli.check_files import check_files

GIB = 1 << 30
MOSHI, VIDEO, TEXT = (get_backbone(name) for name in ("moshi", "videodit", "transformers"))
PRESETS = [(backbone, name) for backbone in (MOSHI, VIDEO, TEXT) for name in backbone.presets()]


def _config(backbone: Any, preset: str, *overrides: str) -> RunConfig:
    checked = check_config(None, text=backbone.presets()[preset], overrides=overrides, training=False)
    assert checked.config is not None
    return checked.config


def _asked(text: str, *overrides: str, devices: int = 8, memory: int | None = 80 * GIB) -> Finding:
    """What is said of the layouts."""
    checked = check_config("c.yaml", text=text, overrides=overrides, devices=devices, memory=memory)
    codes = {finding.code for finding in checked.findings}
    assert not codes & {"TTT401", "TTT402", "TTT205"}  # these are about one device
    (found,) = [finding for finding in checked.findings if finding.code in ("TTT406", "TTT407")]
    return found


def _overrides(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


# --- one device of several ---


@pytest.mark.parametrize(("backbone", "preset"), [(MOSHI, "7b"), (VIDEO, "3s")])
def test_parameters_gradients_and_moments_are_split(backbone: Any, preset: str) -> None:
    config = _config(backbone, preset)
    facts = backbone.facts(config)
    whole, part = (estimate(config, facts, None, Layout(shard=shard)).parts for shard in (1, 4))
    assert part["gradients"] == pytest.approx(whole["gradients"] / 4, abs=32)
    assert estimate(config, facts, None, Layout(replicate=4)).parts["optimizer"] == whole["optimizer"]
    if preset == "7b":  # what is frozen is split as it is
        assert part["optimizer"] == pytest.approx(whole["optimizer"] / 4, abs=32)
        assert part["parameters"] == pytest.approx(whole["parameters"] / 4, abs=32)
    else:  # the masters are the float32 parameters themselves, which are gathered in half precision
        learning = estimate(config, facts).numbers.learning
        assert part["parameters"] == part["gradients"] == pytest.approx(4 * learning / 4, abs=32)
        assert part["optimizer"] == pytest.approx(2 * 4 * learning / 4, abs=64)


def test_shared_heads_divide_the_layers_alone() -> None:
    config = _config(MOSHI, "7b", "ttt.persistent_states=true", "data.shuffle=false")
    facts = MOSHI.facts(config)
    whole, part = (estimate(config, facts, None, Layout(tensor=tensor)) for tensor in (1, 4))
    assert part.parts["backbone activations"] == whole.parts["backbone activations"]
    assert part.parts["state"] * 4 == whole.parts["state"]
    assert part.parts["carries"] * 4 == whole.parts["carries"]
    assert part.parts["optimizer"] == pytest.approx(whole.parts["optimizer"] / 4, rel=0.01)  # gates, norms are whole
    assert part.parts["optimizer"] > whole.parts["optimizer"] / 4
    assert whole.scan is not None
    assert part.scan is not None
    assert part.scan.peak_bytes == pytest.approx(whole.scan.peak_bytes / 4, rel=0.01)


def test_a_config_that_writes_a_layout_is_judged_by_it() -> None:
    """Without `--devices`: of one process, if the config says among how many the run is split."""
    text = VIDEO.presets()["3s"]

    def codes(*overrides: str) -> set[str]:
        found = check_config("c.yaml", text=text, overrides=overrides, memory=80 * GIB).findings
        return {finding.code for finding in found} & {"TTT401", "TTT402"}

    assert codes() == codes("train.parallel={replicate: 8}", "train.batch_size=8") == {"TTT401"}
    assert codes("train.parallel={shard: 8}", "train.batch_size=8") == set()


# --- rows ---


@pytest.mark.parametrize(
    ("rows", "passes", "among", "divided"),
    [
        (8, 1, 4, (8, 1)),
        (1, 64, 8, (8, 8)),
        (6, 4, 4, (8, 3)),
        (4, 1, 8, (8, 1)),
        (3, 5, 4, (4, 5)),
        (5, 3, 3, (15, 1)),
    ],
)
def test_rows_are_divided_evenly(rows: int, passes: int, among: int, divided: tuple[int, int]) -> None:
    config = with_keys(_config(MOSHI, "demo"), {"train.batch_size": rows, "train.num_microbatches": passes})
    assert divided_rows(config, Layout(replicate=among)) == divided
    assert divided[0] % among == 0


def test_streams_are_not_made_of_passes() -> None:
    """Carried states go with the rows of a batch: other passes would be another run."""
    config = _config(MOSHI, "demo", "ttt.persistent_states=true", "data.shuffle=false", "train.num_microbatches=8")
    assert divided_rows(config, Layout(shard=8)) == (8, 8)
    assert needs_of_layout(config, MOSHI.facts(config), None, Layout(shard=8)).grows


def test_which_layouts_can_be_started() -> None:
    config = _config(MOSHI, "demo")  # 4 heads
    facts = MOSHI.facts(config)
    assert len(possible_layouts(config, replace(facts, num_heads=8), 8)) == 10
    assert {layout.tensor for layout in possible_layouts(config, facts, 8)} == {1, 2, 4}
    assert {layout.size for layout in possible_layouts(config, facts, 12)} == {12}
    alone = config.model_copy(update={"adapter": "lora"})
    assert {layout.tensor for layout in possible_layouts(alone, facts, 8)} == {1}
    order = [layout.shard * layout.tensor for layout in possible_layouts(config, facts, 8)]
    assert order == sorted(order)


# --- what is sent ---


def _ring(count: int, among: int) -> int:
    """Bytes that each of n processes sends to sum `count` bytes around a ring: reduce-scatter, then all-gather."""
    piece = count // among
    return sum(piece for _ in range(among - 1)) + sum(piece for _ in range(among - 1))


def test_bytes_that_are_sent() -> None:
    config = _config(VIDEO, "3s", "train.batch_size=8", "train.num_microbatches=2")
    facts = VIDEO.facts(config)
    needs = functools.partial(needs_of_layout, config, facts, None)
    numbers = estimate(config, facts).numbers
    copies = needs(Layout(replicate=8)).sent
    in_half = 2 * numbers.learns + 4 * numbers.adapter  # after each of the two passes
    assert copies.gradients == pytest.approx(2 * _ring(in_half, 8), rel=1e-6)
    assert copies.parameters == copies.heads == 0
    split = needs(Layout(shard=8)).sent
    outside = outside_layers(facts)
    assert outside == (facts.parameters or 0) - 42 * (facts.layer_parameters or 0) > 0
    weights = 2 * outside + 2 * 2 * (numbers.learns - outside) + 2 * 4 * numbers.adapter  # the layers' twice in a pass
    assert split.parameters == pytest.approx(2 * weights * 7 / 8, rel=1e-6)
    assert split.gradients == pytest.approx(4 * numbers.learning * 7 / 8, rel=1e-6)
    both = needs(Layout(2, 4)).sent
    assert both.gradients == pytest.approx(_ring(numbers.learning, 2) + 4 * numbers.learning * 3 / 4, rel=1e-6)
    assert needs(Layout()).sent.total == 0
    tokens = 4 * facts.dim * (facts.tokens_per_window or 0)
    runs = sum(2 + level for level in facts.checkpoints_around_scans or ())  # forward, again, and backward
    assert runs == 6
    answers = runs * _ring(2 * tokens, 2)
    read = 2 * (facts.tokens_per_window or 0)  # post-norm gathers four numbers of each, and sums two in backward
    assert needs(Layout(4, 1, 2)).sent.heads == 2 * 42 * (answers + (runs - 2) * 16 * read + 2 * _ring(8 * read, 2))


def test_gradients_of_float32_are_summed_once_a_step() -> None:
    config = _config(VIDEO, "demo", "train.batch_size=8", "train.num_microbatches=3", "train.trainable=all")
    facts = VIDEO.facts(config)
    numbers, copies = estimate(config, facts).numbers, needs_of_layout(config, facts, None, Layout(replicate=4))
    assert copies.sent.gradients == _ring(4 * numbers.learning, 4)
    assert copies.needs.parts["gradients being summed"] == 4 * numbers.learning  # DDP's buckets
    split = needs_of_layout(config, facts, None, Layout(shard=4)).needs.parts
    assert split["gradients being summed"] == 4 * split["gradients"] == 4 * numbers.learning  # of several passes
    one_pass = with_keys(config, {"train.num_microbatches": 1})
    assert "gradients being summed" not in needs_of_layout(one_pass, facts, None, Layout(shard=4)).needs.parts


def test_what_is_frozen_below_the_first_layer_is_gathered_once() -> None:
    config = _config(MOSHI, "7b")
    facts = MOSHI.facts(config)
    numbers, split = estimate(config, facts).numbers, needs_of_layout(config, facts, None, Layout(shard=2))
    size = 2 * numbers.frozen / 2
    once = 2 * (numbers.frozen - outside_layers(facts)) / 2  # three layers, and the one before, which is fetched ahead
    assert split.sent.parameters == pytest.approx(size + once * 4 / 32 + 4 * numbers.adapter, rel=1e-6)


# --- what to write ---


@pytest.mark.parametrize(("backbone", "preset"), PRESETS, ids=lambda value: getattr(value, "name", value))
def test_every_preset_has_a_layout(backbone: Any, preset: str) -> None:
    """Its lines, written into the preset, give that layout and the same windows in a step."""
    text = backbone.presets()[preset]
    found = _asked(text)
    assert found.severity is not Severity.ERROR
    keys = found.value["write"]
    assert in_one_line(keys) in found.fix
    before, after = _config(backbone, preset), _config(backbone, preset, *_overrides(keys))
    windows = [each.train.batch_size * each.train.num_microbatches for each in (before, after)]
    grows = f"then has {windows[1]} windows, where the config has {windows[0]}" in found.message
    assert (windows[1] > windows[0]) == grows == (preset == "smollm2-135m")  # whose 9 heads cannot be shared
    layout = Layout(**keys["train.parallel"])
    assert layout.size == 8
    assert after.train.batch_size % layout.data_size == 0
    again = estimate(after, backbone.facts(after), None, layout)
    if found.code == "TTT406" and again.complete:
        assert again.high <= 80 * GIB
        listed = [each for each in found.value["layouts"] if not each["larger_step"]]
        first = next((each for each in listed if each["fits"] == "fits"), None)
        if first is not None:
            assert first["layout"] == keys["train.parallel"]
    else:
        assert again.low <= 80 * GIB


def test_settings_are_changed_before_it_is_said_that_nothing_fits() -> None:
    text = MOSHI.presets()["demo"]
    plain = ("train.gradient_checkpointing=false", "ttt.scan_checkpoint_group_size=0", "train.batch_size=8")
    config = _config(MOSHI, "demo", *plain)
    least = min(each.needs.high for each in needs_of_layouts(config, MOSHI.facts(config), None, 2))
    found = _asked(text, *plain, devices=2, memory=least - 1)
    assert found.value["write"]["train.gradient_checkpointing"] is True
    assert "train.gradient_checkpointing" not in _asked(text, *plain, devices=2, memory=least).value["write"]


def test_nothing_fits() -> None:
    found = _asked(VIDEO.presets()["63s"], memory=8 * GIB)
    assert (found.code, found.severity) == ("TTT407", Severity.ERROR)
    assert found.value["write"] is None
    assert "no layout fits" in found.message
    perhaps = _asked(VIDEO.presets()["63s"])
    assert (perhaps.code, perhaps.severity) == ("TTT407", Severity.WARNING)
    longest = int(perhaps.fix.split("at most ")[1].split(" tokens")[0].replace(",", ""))
    config = _config(VIDEO, "63s")
    fits = {
        length: any(
            each.fits(80 * GIB)
            for each in needs_of_layouts(config, replace(VIDEO.facts(config), tokens_per_window=length), None, 8)
        )
        for length in (longest, longest + 5000)
    }
    assert list(fits.values()) == [True, False]


def test_without_memory_the_layouts_are_listed() -> None:
    found = _asked(MOSHI.presets()["demo"], "train.device=cpu", memory=None)
    assert found.code == "TTT406"
    if found.value["memory_bytes"] is None:
        assert "--memory" in found.fix
    assert len(found.value["layouts"]) == 9  # of 4 heads


def test_what_a_backbone_does_not_tell_is_not_promised() -> None:
    found = _asked(TEXT.presets()["demo"])
    assert "TTT alone" in found.message
    assert {each["fits"] for each in found.value["layouts"]} == {"TTT fits"}
    facts = BackboneFacts(dim=64, num_heads=4, num_layers=2)
    config = _config(MOSHI, "demo")
    assert all(each.sent.heads == 0 for each in needs_of_layouts(config, facts, None, 4))


def test_sizes_that_are_for_other_devices_are_told() -> None:
    demo = MOSHI.presets()["demo"]
    for written, told in (
        ("{replicate: 2, shard: 3}", "for others: the sizes make 6 processes"),
        ("{shard: 3}", "for others: the sizes make a multiple of 3 processes"),
        ("{replicate: 2, shard: 4}", None),
        ("{shard: 2}", None),
    ):
        for memory in (80 * GIB, 1 << 20):
            message = _asked(demo, f"train.parallel={written}", "train.batch_size=24", memory=memory).message
            assert ("train.parallel as it is written" in message) is (told is not None)
            assert told is None or message.endswith(told)


def test_a_layout_with_larger_steps_that_splits_less_is_not_passed_over_in_silence() -> None:
    demo = MOSHI.presets()["demo"]
    fewer = _asked(demo, "train.batch_size=2", "train.num_microbatches=1", devices=4)
    (chosen,) = [each for each in fewer.value["layouts"] if each["layout"] == fewer.value["write"]["train.parallel"]]
    assert not chosen["larger_step"]
    assert any(each["larger_step"] and each["layout"]["tensor"] == 1 for each in fewer.value["layouts"])
    assert "the least sharded layout that fits with the config's windows in a step is" in fewer.message
    even = _asked(demo, "train.batch_size=4", devices=4)
    assert "the least sharded layout that fits is replicate 4" in even.message


def test_what_is_said_to_fit_surely_has_been_computed() -> None:
    """Of a model whose parameters fit once more devices split them; and in memory that no number of devices makes."""
    everything = ("train.trainable=all", "train.lr=1e-4", "train.batch_size=2", "train.cuda_graphs=off")
    config, memory = _config(MOSHI, "demo", *everything), 20 << 20
    found = _asked(MOSHI.presets()["demo"], *everything, devices=2, memory=memory)
    ways = found.fix.partition("what surely fits: ")[2].split(", or ")
    assert len(ways) > 1

    def surely(changed: RunConfig, devices: int) -> bool:
        made = proposal(changed, MOSHI.facts, None, devices, memory)
        return made is not None and made.surely

    assert not surely(config, 2)
    for way in ways:
        key, _, value = way.partition(": ")
        if value:
            assert surely(with_keys(config, {f"train.{key}": value}), 2)
        else:
            number = int(way.removesuffix(" devices"))
            assert surely(config, number)
            assert not surely(config, number // 2)
    least = _asked(MOSHI.presets()["demo"], *everything, devices=2, memory=1 << 18)
    assert least.fix.endswith("surely fits: take devices of more memory")


# --- the command ---


def test_the_command_prints_a_table_and_lines_to_write(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(VIDEO.presets()["3s"])
    check_files([str(path)], devices=8, memory="80GiB", select=["TTT4"], ignore=["TTT403", "TTT404"])
    printed = capsys.readouterr().out
    table, _, rest = printed.partition("\n\n")
    assert [line.split()[:3] for line in table.splitlines()[1:4]] == [["8", "1", "1"], ["4", "2", "1"], ["4", "1", "2"]]
    assert "does not fit" in table.splitlines()[1]
    lines = yaml.safe_load(rest.partition("\n\n")[0])
    assert lines == {
        "train": {
            "parallel": {"replicate": 1, "shard": 8, "tensor": 1},
            "batch_size": 8,
            "num_microbatches": 8,
        }
    }
