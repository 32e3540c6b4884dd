"""How likely Moshi finds what it hears: scores against their definition, whole and in pieces, and clips of files."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from moshi.models import loaders
from moshi.modules.transformer import set_attention_context
from torch.nn import functional as F

from ttt import inject
from ttt.adapter import gates_closed
from ttt.config import RunConfig, TTTConfig
from ttt.errors import EnvironmentProblem, UsageError
from ttt.plugins import Scoring, get_backbone, has_capability, run_config_model
from ttt_moshi import clips as clips_module
from ttt_moshi import demo, scoring, streaming
from ttt_moshi.audio import inspect_audio, read_audio, read_resampled, resample
from ttt_moshi.clips import MoshiClips
from ttt_moshi.codec import DemoCodec
from ttt_moshi.encoding import encode_window
from ttt_moshi.loss import moshi_loss
from ttt_moshi.options import MoshiOptions, MoshiScoreOptions
from ttt_moshi.plugin import MoshiBackbone

MOSHI = get_backbone("moshi")
assert has_capability(MOSHI, Scoring)
CONTEXT = 32
TINY = MoshiOptions(dim=32, num_heads=2, num_layers=2)
OWN = slice(1, 9)


def adapted(*, dtype=torch.float32, context=CONTEXT, **changes):
    """The tiny model with a short context and TTT in every layer, its gates open."""
    model = MOSHI.build(TINY, device="cpu", dtype=dtype)
    set_attention_context(model.transformer, context)
    settings = {**MOSHI.ttt_defaults, "mini_batch_size": 4, "initial_gating_alpha": 0.5, **changes}
    inject.apply(model, MOSHI.sites(model), TTTConfig.model_validate(settings), seed=2)
    return model


def codes_of(model, *, batch_size=2, tokens=60, seed=1):
    return MOSHI.example_batch(model, batch_size=batch_size, tokens=tokens, seed=seed)


def in_pieces(model, codes, pieces, *, anew=None):
    """Scores of codes read in pieces; fast weights start anew before the piece that begins with frame `anew`."""
    parts, frame = [], 0
    with MOSHI.score_stream(model, batch_size=len(codes)) as stream:
        for piece in codes.split(pieces, 2):
            if frame == anew:
                stream.learn_anew()
            parts.append(stream.read(piece))
            frame += piece.shape[2]
        parts.append(stream.finish())
    return SimpleNamespace(nll=torch.cat([s.nll for s in parts], 2), mask=torch.cat([s.mask for s in parts], 2))


def assert_same(found, expected, atol=1e-5):
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.nll, expected.nll, rtol=0, atol=atol)


# --- what a score is ---


def test_a_score_is_minus_the_log_of_the_probability_of_each_code():
    """Against kyutai's model as `LMGen` runs it, codebook after codebook, on codes that are laid out by hand."""
    model = adapted(dtype=torch.float64)
    codes = codes_of(model, batch_size=1, tokens=7)
    codes[0, 3, 4] = codes[0, 0, 2] = -1
    frames, grid = codes.shape[2], []
    for step in range(-1, frames):
        column = [model.text_card] + [model.card] * 16
        for stream, delay in enumerate(model.delays):
            if step - delay >= 0:
                column[stream] = int(codes[0, stream, step - delay])
        grid.append(torch.tensor(column)[None, :, None])
    expected = torch.zeros(1, 9, frames, dtype=torch.float64)
    mask = torch.zeros(1, 9, frames, dtype=torch.bool)
    with torch.no_grad():
        hidden, text_logits = model.forward_text(torch.cat(grid[:-1], 2))
        for step, target in enumerate(grid[1:]):
            logits = [text_logits[0, 0, step]]
            with model.depformer.streaming(1):
                for k in range(8):
                    out = model.forward_depformer(k, target[:, k : k + 1], hidden[:, step : step + 1])
                    logits.append(out[0, 0, 0])
            for stream, row in enumerate(logits):
                frame, code = step - model.delays[stream], int(target[0, stream, 0])
                if frame >= 0 and code >= 0:
                    expected[0, stream, frame] = -torch.log(row.softmax(-1)[code])
                    mask[0, stream, frame] = True
    found = MOSHI.score(model, codes)
    assert found.nll.dtype == torch.float64
    assert not mask[0, 2:, -1].any()
    assert mask[0, :2, -1].all()
    assert_same(found, SimpleNamespace(nll=expected, mask=mask), atol=1e-6)  # norms and the softmax are float32


def test_the_training_loss_is_made_of_these_scores():
    model = adapted()
    codes = codes_of(model)
    codes[1, 1:, 50:] = -1
    scores = MOSHI.score(model, codes)
    _, parts = moshi_loss(
        model(codes),
        codes,
        dep_q=8,
        text_padding_weight=1.0,
        first_codebook_weight_multiplier=100.0,
        text_padding_ids={3},
    )
    weights = torch.tensor(MOSHI.score_facts(RunConfig(backbone=MOSHI.tiny())).weights["weighted"])
    weighted = scores.mask * weights[:, None]
    # The loss also counts what a longer clip of the batch lets the model predict: one frame of acoustic codes.
    assert (scores.nll * weighted).sum() / weighted.sum() == pytest.approx(parts["audio_loss"].item(), rel=1e-5)
    text = scores.nll[:, 0].sum() / scores.mask[:, 0].sum()
    assert text == pytest.approx(parts["text_loss"].item(), rel=1e-5)


def test_codes_shifted_against_the_logits_are_worse():
    """The predecessor's fault, on a model that has learnt a sequence that repeats: one frame off, and it is lost."""
    model = adapted(layers=(1,), mini_batch_size=16).train()
    codes = codes_of(model, batch_size=1, tokens=5).repeat(1, 1, 5)
    config = RunConfig(backbone=MOSHI.tiny().model_copy(update={"first_codebook_weight_multiplier": 1.0}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        MOSHI.loss(model, codes, config).loss.backward()
        optimizer.step()
    model.eval()
    scores = MOSHI.score(model, codes)
    with torch.no_grad():
        logits = model(codes).logits
    for shift, worse in ((0, False), (1, True), (2, True), (-1, True)):
        targets = codes[:, OWN].roll(shift, 2)
        shifted = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(1, 8, -1)
        inside = shifted[:, :, 5:-2].mean()
        ours = scores.nll[:, OWN, 5:-2].mean()
        assert inside > ours + 1 if worse else inside == pytest.approx(ours.item(), rel=1e-5), shift


def test_a_batch_scores_as_its_clips_do_alone():
    model = adapted()
    codes = codes_of(model, batch_size=3, tokens=40)
    codes[:, 0] = -1  # as a clip without text
    lengths = (40, 1, 23)
    for row, length in enumerate(lengths):
        codes[row, :, length:] = -1
    together = MOSHI.score(model, codes)
    for row, length in enumerate(lengths):
        alone = MOSHI.score(model, codes[row : row + 1, :, :length])
        cut = SimpleNamespace(
            nll=together.nll[row : row + 1, :, :length], mask=together.mask[row : row + 1, :, :length]
        )
        assert_same(cut, alone)
        assert not together.mask[row, :, length:].any()
        assert not together.nll[row, :, length:].any()
    assert_same(in_pieces(model, codes, 7), together)


def test_with_gates_closed_scores_are_the_plain_models_bit_for_bit():
    plain, model = MOSHI.build(TINY, device="cpu", dtype=torch.float32), adapted(context=512)
    codes = codes_of(model)
    expected = MOSHI.score(plain, codes)
    assert not torch.equal(MOSHI.score(model, codes).nll, expected.nll)
    streamed = in_pieces(plain, codes, 7)
    with gates_closed(model):
        assert torch.equal(MOSHI.score(model, codes).nll, expected.nll)
        assert torch.equal(in_pieces(model, codes, 7).nll, streamed.nll)


def test_a_model_in_bfloat16_gives_its_scores_in_float32():
    model = adapted(dtype=torch.bfloat16)
    codes = codes_of(model, tokens=40)
    scores, precise = MOSHI.score(model, codes), MOSHI.score(adapted(), codes)
    assert scores.nll.dtype == torch.float32
    torch.testing.assert_close(scores.nll, precise.nll, rtol=0.1, atol=0.1)
    torch.testing.assert_close(in_pieces(model, codes, 7).nll, scores.nll, rtol=0.1, atol=0.1)


def test_logits_are_made_of_some_frames_at_a_time(monkeypatch):
    model, made = adapted(), []
    codes = codes_of(model, batch_size=3, tokens=20)
    whole = MOSHI.score(model, codes)
    monkeypatch.setattr("ttt_moshi.heads.HEAD_ROWS", 16)
    handle = model.text_linear.register_forward_hook(lambda module, args, out: made.append(out.shape[:2].numel()))
    assert_same(MOSHI.score(model, codes), whole)
    handle.remove()
    assert made == [15, 15, 15, 15]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes[:, :9], r"2 streams of codes are \[2, 17, T\] integers, not \[2, 9, 5\]"),
        (lambda codes: codes[0], r"not \[17, 5\]"),
        (lambda codes: codes.float(), "integers"),
        (lambda codes: codes + 64, r"audio codes of this model are 0 to 63, or -1 for nothing, but these are 6\d to 1"),
        (lambda codes: torch.cat([codes[:, :1] + 300, codes[:, 1:]], 1), "text tokens of this model are 0 to 299"),
        (lambda codes: codes - 100, "audio codes|text tokens"),
    ],
)
def test_what_are_no_codes_of_the_model_is_refused(change, message):
    model = adapted()
    codes = codes_of(model, tokens=5)
    codes[:, 0] = 30
    if "[17, 5]" not in message.replace("\\", ""):
        with pytest.raises(UsageError, match=message):
            MOSHI.score(model, change(codes))
    with MOSHI.score_stream(model, batch_size=2) as stream, pytest.raises(UsageError, match=message):
        stream.read(change(codes))


# --- in pieces ---

LONG = 195  # frames: six times the context
SEVENS = [7] * 27 + [6]


@pytest.mark.parametrize(
    ("mini_batch_size", "pieces"),
    [
        (16, [1] * 70),
        (16, SEVENS),
        (16, [188, 7]),
        (16, [40, 1, 0, 33, 99, 3, 19]),
        (1, SEVENS),
        (4, [188, 7]),
    ],
    ids=["frame by frame", "7", "188", "mixed", "7, learning at each token", "188, mini-batches of 4"],
)
def test_pieces_score_as_the_whole_does_beyond_the_context(mini_batch_size, pieces):
    model = adapted(mini_batch_size=mini_batch_size, layers=(1,))
    codes = codes_of(model, tokens=sum(pieces))
    assert_same(in_pieces(model, codes, pieces), MOSHI.score(model, codes), atol=1e-4)


def test_long_pieces_are_split(monkeypatch):
    model = adapted()
    codes = codes_of(model, tokens=LONG)
    whole = MOSHI.score(model, codes)
    monkeypatch.setattr(scoring, "PIECE", 16)
    with MOSHI.score_stream(model, batch_size=2):
        ring = model.transformer.layers[0].self_attn._streaming_state.kv_cache
        assert ring.cache.shape[3] == CONTEXT + 15
    assert_same(in_pieces(model, codes, [188, 7]), whole, atol=1e-4)


@pytest.mark.parametrize("pieces", [[7] * 10, [188, 7]])
def test_kyutais_own_ring_would_be_wrong(monkeypatch, pieces):
    """The test above can fail: without longer rings, pieces lose keys that their first frames attend to."""
    model = adapted(layers=(1,))
    codes = codes_of(model, tokens=sum(pieces))
    expected = MOSHI.outputs(model, codes)
    torch.testing.assert_close(MOSHI.stream(model, codes, pieces=pieces), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(streaming, "_widen", lambda attention, longest: None)
    if pieces[0] > CONTEXT:  # such a piece overwrites even itself
        away = (MOSHI.stream(model, codes, pieces=pieces) - expected).abs()
        assert away.max() > 1e-3
        return
    away = (in_pieces(model, codes, pieces).nll - MOSHI.score(model, codes).nll).abs()
    first = CONTEXT // 7 * 7  # of the first piece that does not fit beside what came before
    assert away[:, :2, :first].max() < 1e-5
    assert away[:, :2, first:].max() > 1e-3


def test_what_a_stream_keeps_does_not_grow():
    model = adapted()

    def kept(stream):
        held = [value for value in vars(stream._reading).values() if isinstance(value, torch.Tensor)]
        rings = [layer.self_attn._streaming_state.kv_cache.cache for layer in model.transformer.layers]
        return sum(tensor.numel() for tensor in held + rings)

    with MOSHI.score_stream(model, batch_size=1) as stream:
        sizes = []
        for _ in range(4):
            scores = stream.read(codes_of(model, batch_size=1, tokens=50))
            sizes.append(kept(stream))
        assert scores.nll.shape == (1, 9, 50)
        assert stream.finish().nll.shape == (1, 9, 1)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("anew", [21, 32])
def test_learning_anew_resets_fast_weights_alone_at_any_frame(anew):
    model = adapted(mini_batch_size=16)
    codes = codes_of(model, tokens=50)
    whole = MOSHI.score(model, codes)
    reset = in_pieces(model, codes, [anew, 50 - anew], anew=anew)
    assert_same(in_pieces(model, codes, [1] * 50, anew=anew), reset, atol=1e-4)
    complete = [anew if delay == 0 else anew - 1 for delay in model.delays[:9]]
    for stream, frames in enumerate(complete):
        torch.testing.assert_close(reset.nll[:, stream, :frames], whole.nll[:, stream, :frames], rtol=0, atol=1e-4)
        assert (reset.nll - whole.nll)[:, stream, frames : frames + 8].abs().max() > 1e-4
    adapter = model.transformer.layers[1].ttt
    with MOSHI.score_stream(model, batch_size=2) as stream:
        fresh = {name: tensor.clone() for name, tensor in adapter.streams.tensors().items()}
        stream.read(codes)
        offsets = model.transformer.layers[1].self_attn._streaming_state.kv_cache.end_offset.clone()
        stream.learn_anew()
        for name, tensor in adapter.streams.tensors().items():
            assert torch.equal(tensor, fresh[name]), name
        assert torch.equal(model.transformer.layers[1].self_attn._streaming_state.kv_cache.end_offset, offsets)
        assert offsets.tolist() == [50, 50]


def test_streams_that_have_ended_and_models_that_stream_already():
    model = adapted()
    codes = codes_of(model, tokens=3)
    with MOSHI.score_stream(model, batch_size=2) as stream:
        with pytest.raises(UsageError, match="the model is streaming already"):
            in_pieces(model, codes, [3])
        assert stream.read(codes[:, :, :0]).nll.shape == (2, 9, 0)
        stream.finish()
        for method in (lambda: stream.read(codes), stream.finish, stream.learn_anew):
            with pytest.raises(UsageError, match="these streams have ended; open another"):
                method()
    with MOSHI.score_stream(model, batch_size=2) as stream:
        pass
    with pytest.raises(UsageError, match="these streams have ended"):
        stream.read(codes)
    assert not model.is_streaming
    set_attention_context(model.transformer, None)
    with pytest.raises(UsageError, match="has no `context`"):
        in_pieces(model, codes, [3])
    assert MOSHI.score(model, codes).mask.any()


# --- facts and options ---


def run_config(**score):
    return run_config_model(MOSHI).model_validate({"backbone": {"name": "moshi"}, "eval": {"score": score}})


def test_the_facts_name_the_streams_and_weigh_them(tmp_path):
    facts = MOSHI.score_facts(run_config(streams="semantic"))
    assert facts.streams[:3] == ("text", "semantic", "acoustic 1")
    assert len(facts.streams) == 9
    assert facts.chosen == "semantic"
    assert facts.weights["weighted"] == (0.0, 100.0, *[1.0] * 7)
    assert (facts.positions_per_second, facts.attention_span, facts.padding) == (12.5, 512, -1)
    assert MOSHI.build(MoshiOptions(), device="meta", dtype=torch.float32).context == facts.attention_span
    seven = MOSHI.score_facts(RunConfig(backbone=MoshiOptions(preset="7b")))
    assert seven.attention_span == loaders._lm_kwargs["context"]
    written = tmp_path / "config.json"
    options = MoshiOptions(preset="7b", config_path=str(written))
    own = {key: value for key, value in loaders._lm_kwargs.items() if key != "context"}
    sixteen = {"context": 500, "n_q": 32, "dep_q": 16, "delays": [0] * 33}
    for changes, span, streams in ((sixteen, 500, 17), ({}, None, 9)):
        written.write_text(json.dumps({**own, **changes}))
        facts = MOSHI.score_facts(RunConfig(backbone=options))
        assert (facts.attention_span, len(facts.streams)) == (span, streams)
    written.write_text(json.dumps({**own, "context": "long"}))
    with pytest.raises(EnvironmentProblem, match="its context is 'long'"):
        MOSHI.score_facts(RunConfig(backbone=options))


def test_text_that_is_not_there_cannot_be_scored():
    with pytest.raises(ValueError, match="streams: text scores the text stream, but text: masked leaves it empty"):
        run_config(streams="text")
    assert MOSHI.score_facts(run_config(streams="text", text="padding")).chosen == "text"


def test_only_the_demo_has_tasks_of_its_own(monkeypatch, tmp_path):
    folder = demo.FOLDER / "tasks"
    assert MOSHI.own_tasks_data(run_config()) == (folder if folder.is_dir() else None)
    assert MOSHI.own_tasks_data(RunConfig(backbone=MoshiOptions(preset="7b"))) is None
    monkeypatch.setattr("ttt_moshi.plugin.__file__", str(tmp_path / "plugin.py"))
    assert MoshiBackbone().own_tasks_data(run_config()) is None
    (tmp_path / "demo" / "tasks").mkdir(parents=True)
    assert MoshiBackbone().own_tasks_data(run_config()) == tmp_path / "demo" / "tasks"


# --- clips ---


def write(path, samples, *, rate=16000, channels=1, seed=0):
    """A file with a part of the demo's speech, other in each channel."""
    speech, _ = soundfile.read(demo.FOLDER / "dialogue.flac", frames=samples + 999, dtype="float32")
    speech = speech.T if len(speech) >= samples + 999 else np.tile(speech.T, 2)
    columns = [speech[k % 2, 500 * k : samples + 500 * k] * (1 - 0.3 * k) for k in range(channels)]
    soundfile.write(path, np.stack(columns, 1), rate, subtype="PCM_16")
    return path


def demo_reader(**score):
    return MOSHI.clip_reader(run_config(**score), device="cpu")


def whole_sound(path, rate):
    info = inspect_audio(path)
    return resample(read_audio(path, info, 0, info.samples), info.sample_rate, rate).mean(0)[None, None]


@pytest.mark.parametrize(
    ("name", "samples", "rate", "channels", "frames"),
    [
        ("a.wav", 1280, 16000, 1, 1),
        ("a.flac", 1281, 16000, 1, 2),
        ("a.wav", 16000 * 41 + 1, 16000, 2, 513),  # three pieces
        ("a.flac", 44100 * 21 + 7, 44100, 1, 263),
        ("a.wav", 22050 * 3, 22050, 2, 38),
        ("a.flac", 8000, 8000, 1, 13),
    ],
)
def test_a_clip_is_what_the_codec_makes_of_the_whole_file(tmp_path, name, samples, rate, channels, frames):
    path, reader = write(tmp_path / name, samples, rate=rate, channels=channels), demo_reader()
    clip = reader.read(path)
    assert clip.shape == (17, frames)
    assert clip.dtype == torch.int64
    assert reader.positions(path) == frames
    codec = DemoCodec.load()
    assert torch.equal(clip[1:9], codec.encode(whole_sound(path, 16000))[0])
    assert torch.equal(clip[9:], codec.encode(torch.zeros(1, 1, frames * 1280))[0])
    pieces = list(reader.stream(path))
    assert [piece.shape[1] for piece in pieces] == [256] * (frames // 256) + [frames % 256]
    assert torch.equal(torch.cat(pieces, 1), clip)


def test_the_options_fill_the_streams_that_the_file_does_not(tmp_path):
    path = write(tmp_path / "a.wav", 4000)
    clips = {}
    for user in ("silence", "zeros"):
        for text in ("masked", "padding"):
            reader = demo_reader(user_stream=user, text=text)
            clip = clips[user, text] = reader.read(path)
            assert clip[0].unique().tolist() == [-1 if text == "masked" else 3]
            assert clip[9:].unique().tolist() == [-1 if user == "zeros" else 0]
            assert torch.equal(clip[1:9], clips["silence", "masked"][1:9])
            assert (reader.identity["user_stream"], reader.identity["text"]) == (user, text)
    identity = demo_reader().identity
    assert identity["codec_sha256"] == "c3e6de3dab0cbf4b70ddc311de1ae62927581b8e5c1acb9d5bec4b7805179ed6"
    assert {**demo_reader(streams="all", normalise="sum").identity} == {**identity}
    assert "stands in for Mimi" in demo_reader().notice


@pytest.mark.parametrize("rate", [8000, 11025, 23976, 44100, 48000])
def test_resampling_a_span_is_the_span_of_the_whole(tmp_path, rate):
    path = write(tmp_path / "a.wav", rate, rate=rate, channels=2)
    info = inspect_audio(path)
    whole = resample(read_audio(path, info, 0, info.samples), rate, 24000)
    assert whole.shape == (2, 24000)
    for begin, end in ((0, 24000), (0, 1), (23999, 24000), (1920, 7001), (5000, 24000)):
        found = read_resampled(path, info, 24000, begin, end)
        torch.testing.assert_close(found, whole[:, begin:end], rtol=0, atol=1e-6)


def test_files_that_are_no_clip_are_named(tmp_path):
    reader = demo_reader()
    short, empty, text, broken = (tmp_path / name for name in ("s.wav", "e.wav", "t.wav", "b.flac"))
    write(short, 1279)
    write(empty, 0)
    text.write_text("no sound")
    broken.write_bytes(write(tmp_path / "whole.flac", 40000).read_bytes()[:20000])
    for path, message in (
        (short, r"s.wav: holds 0.080 s of sound, less than a frame \(0.08 s\)"),
        (empty, r"e.wav: .*(less than a frame|cannot be read)"),
        (text, "t.wav: cannot be read as sound: "),
        (broken, "b.flac: cannot be read as sound: "),
        (tmp_path / "none.wav", "none.wav: cannot be read as sound: No such file"),
        (tmp_path, "cannot be read as sound: .*folder"),
    ):
        for method in (reader.positions, reader.read, lambda path: next(iter(reader.stream(path)))):
            with pytest.raises(EnvironmentProblem, match=message):
                method(path)


# --- Mimi ---


@pytest.fixture(scope="module")
def mimi():
    """A Mimi of kyutai's structure: narrow and random, with a short context and codes that follow its attention."""
    config = copy.deepcopy(loaders._mimi_config)
    config["seanet"].update(dimension=32, n_filters=4)
    config["quantizer"].update(dimension=16, bins=32, n_q=8, input_dimension=32, output_dimension=32)
    config["transformer"].update(d_model=32, num_heads=2, num_layers=2, dim_feedforward=64, context=6, layer_scale=1.0)
    config["transformer"].update(input_dimension=32, output_dimensions=[32])
    torch.manual_seed(0)
    made = loaders.get_mimi(None, config, num_codebooks=8)
    speech, rate = soundfile.read(demo.FOLDER / "dialogue.flac", frames=16000 * 20, dtype="float32")
    sound = resample(torch.from_numpy(speech[:, :1].T), rate, 24000)[None]
    with torch.no_grad():
        made.quantizer.train()(made.encode_to_latent(sound, quantize=False), 12.5)  # fits its codebooks by k-means
    made.eval()
    return made


def test_mimi_in_pieces_is_mimi_on_the_whole(mimi, tmp_path, monkeypatch):
    """What is quantised is compared: near the edge between two codes, a last digit decides."""
    path = write(tmp_path / "a.wav", 24000 * 3 + 77, rate=24000)
    sound = whole_sound(path, 24000)
    with torch.no_grad():
        expected, codes = mimi.encode_to_latent(sound, quantize=False)[0], mimi.encode(sound)[0]
        silence = mimi.encode_to_latent(torch.zeros_like(sound), quantize=False)[0]
    reader = MoshiClips(mimi, MoshiScoreOptions(), codec_hash="0")
    assert reader.positions(path) == codes.shape[1] == 38
    quantised, quantise = [], mimi.quantizer.encode
    monkeypatch.setattr(mimi.quantizer, "encode", lambda latents: (quantised.append(latents), quantise(latents))[1])

    def read(frames):
        quantised.clear()
        monkeypatch.setattr(clips_module, "PIECE", frames)
        clip = reader.read(path)
        return clip, torch.cat(quantised, 2)

    for frames in (1, 7, 256):
        clip, found = read(frames)
        assert (clip[1:9] == codes).float().mean() > 0.9
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1], silence, rtol=0, atol=1e-5)
    assert not mimi.is_streaming
    monkeypatch.setattr("ttt_moshi.encoding.LONG_WINDOW", 10)  # frames: so it is a long window of training
    monkeypatch.setattr("ttt_moshi.encoding.PIECE", 7)
    quantised.clear()
    assert (encode_window(mimi, sound) == codes).float().mean() > 0.9
    assert [part.shape[2] for part in quantised] == [7, 7, 7, 7, 7, 3]
    torch.testing.assert_close(torch.cat(quantised, 2)[0], expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(clips_module, "PIECE", 2)
    twins = zip(reader.stream(path), reader.stream(path), strict=True)  # two streams in turn
    assert all(torch.equal(one, other) for one, other in twins)
    monkeypatch.setattr(streaming, "_widen", lambda attention, longest: None)
    away = (read(1)[1][0] - expected).abs()  # with kyutai's own ring: even a frame is two steps of Mimi's attention
    assert away[:, :3].max() < 1e-5
    assert away[:, 3:].max() > 1e-2
