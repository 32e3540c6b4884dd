"""TTT in the real `moshi` package's model: sizes, streaming through `LMGen`, training at every checkpoint setting."""

from __future__ import annotations

import itertools

import pytest
import torch
from moshi.models import LMGen, loaders
from torch import Tensor

from ttt import inject
from ttt.adapter import gates_closed
from ttt.config import RunConfig, TTTConfig
from ttt.errors import EnvironmentProblem, InjectionError, UsageError
from ttt.plugins import get_backbone
from ttt_moshi.options import MoshiOptions
from ttt_moshi.plugin import MoshiBackbone
from ttt_moshi.weights import checkpoint_info

MOSHI = get_backbone("moshi")


def config(**changes) -> TTTConfig:
    return TTTConfig.model_validate({**MOSHI.ttt_defaults, **changes})


def tiny(**changes):
    model = MOSHI.build(MOSHI.tiny(), device="cpu", dtype=torch.float32)
    return model, inject.apply(model, MOSHI.sites(model), config(**changes), seed=2)


def test_moshi_7b_has_its_parameters_and_ttt_its_own():
    """On the meta device: the counts of the design's facts."""
    model = MOSHI.build(MoshiOptions(preset="7b"), device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 7_687_729_152
    injection = inject.apply(model, MOSHI.sites(model), config(layers="29,30,31"))
    assert list(injection.adapters) == [f"transformer.layers.{n}.ttt" for n in (29, 30, 31)]
    assert sum(value.numel() for value in injection.state_dict().values()) == 214_474_848


def test_the_demo_has_moshis_structure_and_the_same_values_every_time():
    one, other = (MOSHI.build(MoshiOptions(), device="cpu", dtype=torch.float32) for _ in range(2))
    assert one.num_codebooks == 17
    assert one.dep_q == 8
    assert one.delays == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Recorder:
    """The codes that `LMGen` feeds the main transformer, and the text logits it gets, step by step."""

    def __init__(self, model) -> None:
        self.columns: dict[int, list[Tensor]] = {}
        self.logits: list[Tensor] = []
        embeddings = [model.text_emb, *model.emb]
        self.handles = [
            embedding.register_forward_pre_hook(lambda _, args, i=i: self.columns.setdefault(i, []).append(args[0]))
            for i, embedding in enumerate(embeddings)
        ]

    @property
    def codes(self) -> list[Tensor]:
        """`[B,17]` of each step."""
        columns = [self.columns[i] for i in sorted(self.columns)]
        return [torch.stack([part[:, 0] for part in step], 1) for step in zip(*columns, strict=True)]

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("mini_batch_size", [1, 4, 16])
def test_lmgen_frame_by_frame_is_the_whole_forward(mini_batch_size):
    """Three streams, one paused for a while, one reset midway; each is then run whole over what it was fed."""
    model, _ = tiny(mini_batch_size=mini_batch_size)
    steps, paused_row, pause, reset_row, reset_at = 41, 1, range(9, 16), 2, 22
    user = MOSHI.example_batch(model, batch_size=3, tokens=steps, seed=4)[:, 9:]
    recorder = Recorder(model)
    generator = LMGen(model, use_sampling=False, support_out_of_sync=True, on_text_logits_hook=recorder.logits.append)
    with torch.no_grad(), generator.streaming(3):
        for step in range(steps):
            if step == pause.start:
                generator.set_exec_mask(torch.tensor([row != paused_row for row in range(3)]))
            if step == pause.stop:
                generator.set_exec_mask(torch.ones(3, dtype=torch.bool))
            if step == reset_at:
                generator.reset_streaming(torch.tensor([row == reset_row for row in range(3)]))
            generator.step(user[:, :, step : step + 1])
    recorder.stop()
    codes, logits = torch.stack(recorder.codes, -1), torch.cat([x[:, 0] for x in recorder.logits], 1)
    assert codes.shape == (3, 17, steps)

    courses = {
        0: [list(range(steps))],
        paused_row: [[step for step in range(steps) if step not in pause]],
        reset_row: [list(range(reset_at)), list(range(reset_at, steps))],
    }
    with torch.no_grad():
        for row, streams in courses.items():
            for stream in streams:
                _, expected = model.forward_text(codes[row : row + 1, :, stream])
                torch.testing.assert_close(logits[row, stream], expected[0, 0], rtol=1e-4, atol=1e-4)


def test_streaming_keeps_addresses_and_leaves_nothing_behind():
    """A CUDA graph recorded over the state stays valid; leaving the context forgets the streams."""
    model, injection = tiny(mini_batch_size=4)
    codes = MOSHI.example_batch(model, batch_size=2, tokens=6, seed=0)
    adapter = injection.adapters["transformer.layers.1.ttt"]
    with torch.no_grad(), model.streaming(2):
        state = adapter._streaming_state.state
        addresses = {name: tensor.data_ptr() for name, tensor in state.memory().items()}
        before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        for step in range(5):
            model.forward_text(codes[:, :, step : step + 1])
        model.reset_streaming(torch.tensor([True, False]))
        state = adapter._streaming_state.state
        assert {name: tensor.data_ptr() for name, tensor in state.memory().items()} == addresses
        assert state.count.tolist() == [0, 1]
        for name, tensor in state.tensors().items():
            assert torch.equal(tensor[0], before[name][0]), name
        assert not torch.equal(state.weights[0][1], before["W1"][1])
        with pytest.raises(InjectionError, match="the model is streaming"):
            injection.eject()
    assert adapter._streaming_state is None
    first = MOSHI.stream(model, codes, pieces=[6])
    torch.testing.assert_close(MOSHI.stream(model, codes, pieces=[2, 4]), first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 6, [2, 4]])
def test_a_token_that_is_not_finite_stays_out_of_its_stream(pieces):
    """Frame by frame in place and several at a time; what it leaves is counted where streams can be seen."""
    model, injection = tiny(mini_batch_size=4, skip_nonfinite_tokens=True)
    adapter = injection.adapters["transformer.layers.1.ttt"]
    x = torch.randn(2, 6, model.dim, generator=torch.Generator().manual_seed(6))
    x[1, 2, 3] = torch.nan
    assert adapter.streams is None
    with torch.no_grad(), model.streaming(2):
        found = torch.cat([adapter(piece) for piece in x.split(pieces, 1)], 1)
        assert adapter.streams.skipped.tolist() == [0, 1]
        assert all(tensor.isfinite().all() for tensor in adapter.streams.tensors().values())
        model.reset_streaming(torch.tensor([False, True]))
        assert adapter.streams.skipped.tolist() == [0, 0]
    with torch.no_grad():
        torch.testing.assert_close(found, adapter(x), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found.isfinite().all(-1).tolist() == [[True] * 6, [True, True, False, True, True, True]]


@pytest.mark.parametrize("pieces", [[1] * 6, [2, 4], [6]])
def test_a_mask_leaves_tokens_out_of_a_stream(pieces):
    """Frame by frame and several at a time, and not streaming; with a stream that pauses beside it."""
    model, injection = tiny(mini_batch_size=4)
    adapter = injection.adapters["transformer.layers.1.ttt"]
    mask = torch.tensor([[False, True, True, False, True, True], [True, True, False, True, True, False]])
    x = torch.randn(2, 6, model.dim, generator=torch.Generator().manual_seed(6)).where(mask[..., None], torch.nan)
    with torch.no_grad():
        alone = adapter(x[mask].view(2, 4, -1))
        with model.streaming(2):
            parts = [
                adapter(piece, mask=counted)
                for piece, counted in zip(x.split(pieces, 1), mask.split(pieces, 1), strict=True)
            ]
            assert adapter.streams.count.tolist() == [0, 0]
            adapter._streaming_state.set_exec_mask(torch.tensor([True, False]))
            adapter(x[:, 1:3], mask=mask[:, 1:3])
            assert adapter.streams.count.tolist() == [2, 0]
        whole = adapter(x, mask=mask)
    for found in (torch.cat(parts, 1), whole):
        torch.testing.assert_close(found[mask].view(2, 4, -1), alone, rtol=1e-4, atol=1e-5)
        assert found[~mask].isnan().all()


def test_injection_after_streaming_is_found_by_streaming():
    """kyutai's modules remember their streaming children from the first use; ours must still be among them."""
    model = MOSHI.build(MOSHI.tiny(), device="cpu", dtype=torch.float32)
    codes = MOSHI.example_batch(model, batch_size=2, tokens=9, seed=0)
    plain = MOSHI.stream(model, codes, pieces=[1] * 9)
    injection = inject.apply(model, MOSHI.sites(model), config(mini_batch_size=4))
    adapted = MOSHI.stream(model, codes, pieces=[1] * 9)
    with torch.no_grad():
        torch.testing.assert_close(adapted, MOSHI.outputs(model, codes), rtol=1e-4, atol=1e-5)
    with gates_closed(model):
        assert torch.equal(MOSHI.stream(model, codes, pieces=[1] * 9), plain)
    injection.eject()
    assert torch.equal(MOSHI.stream(model, codes, pieces=[1] * 9), plain)


SETTINGS = list(itertools.product([0, 1, 16, 188], [False, True]))


@pytest.mark.parametrize(("mini_batch_size", "frames"), [(1, 20), (16, 188)])
def test_training_is_the_same_at_every_checkpoint_setting(mini_batch_size, frames):
    """Five steps on 15 s windows, 188 frames: where the field's run died, or would have learned something else.

    Of mini-batches of one token fewer frames have groups of every size as well: two of 16, the second one short.
    """
    run_config = RunConfig(backbone=MOSHI.tiny())
    losses: dict[tuple[int, bool], list[float]] = {}
    for group_size, checkpointing in SETTINGS:
        model = MOSHI.build(MOSHI.tiny(), device="cpu", dtype=torch.float32).train()
        settings = config(mini_batch_size=mini_batch_size, layers=(1,), scan_checkpoint_group_size=group_size)
        inject.apply(model, MOSHI.sites(model), settings, seed=2)
        MOSHI.set_gradient_checkpointing(model, checkpointing)
        codes = MOSHI.example_batch(model, batch_size=1, tokens=frames, seed=3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        course = losses.setdefault((group_size, checkpointing), [])
        for _ in range(5):
            optimizer.zero_grad()
            output = MOSHI.loss(model, codes, run_config)
            output.loss.backward()
            optimizer.step()
            course.append(output.loss.item())
    expected = losses[0, False]
    assert expected[-1] < expected[0] - 0.1
    for setting, course in losses.items():
        assert course == pytest.approx(expected, rel=1e-5, abs=1e-5), setting


def test_options_of_the_other_preset_are_refused():
    with pytest.raises(ValueError, match="hf_repo belongs to preset: 7b"):
        MoshiOptions(hf_repo="kyutai/moshiko-pytorch-bf16")
    with pytest.raises(ValueError, match="dim belongs to preset: demo"):
        MoshiOptions(preset="7b", dim=64)
    with pytest.raises(ValueError, match="does not divide into 3 heads"):
        MoshiOptions(num_heads=3)


def test_missing_local_weights_are_named(tmp_path):
    options = MoshiOptions(preset="7b", moshi_path=str(tmp_path / "none.safetensors"))
    with pytest.raises(EnvironmentProblem, match=r"backbone\.moshi_path: no file .*none\.safetensors"):
        MOSHI.build(options, device="cpu", dtype=torch.float32)


# --- which weights ---


def _cached(folder, repository, file, commit):
    """The hub's cache with one file of a commit, as its client lays it."""
    snapshot = folder / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
    (snapshot / file).parent.mkdir(parents=True)
    (snapshot / file).write_text("{}")
    (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
    (snapshot.parents[1] / "refs" / "main").write_text(commit)


def test_the_revision_reaches_the_hubs_client_and_the_adapter_file(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(loaders, "hf_hub_download", lambda *args, **more: asked.append((args, more)) or 1 / 0)
    with pytest.raises(EnvironmentProblem, match="cannot be fetched"):
        checkpoint_info(MoshiOptions(preset="7b", hf_repo="me/mine", revision="v2"))
    assert asked == [(("me/mine", "config.json"), {"revision": "v2"})]

    commits = "a" * 40, "b" * 40
    for commit in commits:
        _cached(tmp_path, "me/mine", "config.json", commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = MoshiBackbone()
    for revision, commit in ((None, commits[1]), (commits[0], commits[0])):
        options = MoshiOptions(preset="7b", hf_repo="me/mine", revision=revision)
        assert backbone.provenance(options) == {"repository": "me/mine", "commit": commit}
    assert backbone.provenance(MoshiOptions(preset="7b", hf_repo="me/other")) == {"repository": "me/other"}
    merged = MoshiOptions(preset="7b", hf_repo="me/other", lora_path="runs/lora.safetensors")
    assert backbone.provenance(merged) == {"repository": "me/other", "lora": "lora.safetensors"}
    assert backbone.provenance(MoshiOptions()) == {}


def test_a_revision_that_nothing_reads_is_refused(tmp_path):
    for name in ("m.safetensors", "c.safetensors", "t.model"):
        (tmp_path / name).touch()
    paths = dict(zip(("moshi_path", "mimi_path", "tokenizer_path"), map(str, sorted(tmp_path.iterdir())), strict=True))
    with pytest.raises(UsageError, match=r"backbone\.revision: is of a repository, and every file is a local one"):
        checkpoint_info(MoshiOptions(preset="7b", revision="v2", **paths))
    with pytest.raises(ValueError, match="revision belongs to preset: 7b"):
        MoshiOptions(revision="v2")
