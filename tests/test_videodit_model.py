"""CogVideoX's transformer by segments, with TTT in it: against diffusers' own, against its parts done by hand."""

from __future__ import annotations

import itertools
import warnings

import diffusers
import pytest
import torch
import transformers
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from torch import Tensor

from ttt import gates_closed, inject
from ttt.adapter import Gate
from ttt.check.estimate import estimate
from ttt.config import RunConfig, TrainConfig, TTTConfig
from ttt.errors import EnvironmentProblem, InjectionError, UsageError
from ttt.inner_curves import InnerCurves
from ttt.plugins import get_backbone
from ttt.testing import laws
from ttt_videodit.adapter import BidirectionalTTT
from ttt_videodit.attention import Remat
from ttt_videodit.building import build
from ttt_videodit.diffusion import schedule_of
from ttt_videodit.encoders import encoders_of, load_text_encoder, load_vae
from ttt_videodit.geometry import Segments
from ttt_videodit.layout import Layout
from ttt_videodit.model import VideoDiT, sites
from ttt_videodit.options import VideoDiTData, VideoDiTOptions
from ttt_videodit.plugin import VideoDiTBackbone
from ttt_videodit.pretrained import source_of

TestVideoDiT = laws("videodit")
if torch.cuda.is_available():
    TestVideoDiTOnCuda = laws("videodit", device="cuda")

TINY = {"preset": "demo", "dim": 32, "num_heads": 2, "num_layers": 2, "attn_length": 2}


def options(**changes: object) -> VideoDiTOptions:
    return VideoDiTOptions.model_validate({**TINY, **changes})


def video_config(**changes: object) -> TTTConfig:
    return TTTConfig.model_validate({"preset": "video", "layer_type": "mlp", "mini_batch_size": 8, **changes})


def video(count: int = 1, *, attn_length: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Latents, texts and times of two videos of `count` segments, 2 × 3 tokens a frame."""
    generator = torch.Generator().manual_seed(seed)
    frames = Segments(attn_length).frames(count)
    return [
        torch.randn(2, frames, 16, 4, 6, generator=generator, dtype=dtype),
        torch.randn(2, count, 5, 32, generator=generator, dtype=dtype),
        torch.tensor([400, 700]),
    ]


def adapted(count: int = 1, **changes: object) -> tuple[VideoDiT, inject.Injection]:
    model = build(options(**changes), device="cpu", dtype=torch.float32)
    return model, inject.apply(model, sites(model), video_config(), causal=False, seed=1)


# --- diffusers' own, bit for bit ---


@pytest.mark.parametrize("with_ttt", [False, True])
def test_one_segment_with_closed_gates_is_diffusers_own_forward(with_ttt: bool) -> None:
    model = build(options(attn_length=12), device="cpu", dtype=torch.float32)
    plain = CogVideoXTransformer3DModel.from_config(dict(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    latents, text, times = video(1, attn_length=12)
    if with_ttt:
        inject.apply(model, sites(model), video_config(), causal=False)
    # The rotary tables of diffusers' own pipeline, for the size that the model was made for.
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.__new__(CogVideoXPipeline)
    pipeline.vae_scale_factor_spatial, pipeline.transformer = 8, plain
    rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipeline, 32, 48, 13, torch.device("cpu"))
    with torch.no_grad(), gates_closed(model):
        found = model(latents, text, times).sample
        expected = plain(latents, text[:, 0], times, image_rotary_emb=rotary).sample
        three_dimensional = model(latents, text[:, 0], times, return_dict=False)[0]
    assert torch.equal(found, expected)
    assert torch.equal(three_dimensional, expected)


def test_three_segments_with_closed_gates_are_diffusers_attention_on_each_and_averaged() -> None:
    model, _ = adapted()
    block = model.transformer_blocks[0]
    latents, text, _ = video(3)
    layout = model.layout(latents, text)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, layout.frames * 6, 32, generator=generator)
    texts = torch.randn(2, 15, 32, generator=generator)
    rotary = model._segment_rotary(layout, torch.device("cpu"))
    with torch.no_grad(), gates_closed(model):
        found, found_texts = block.attn1(tokens, texts, image_rotary_emb=rotary, layout=layout)

    plain = Attention(
        query_dim=32,
        dim_head=16,
        heads=2,
        qk_norm="layer_norm",
        eps=1e-6,
        bias=True,
        processor=CogVideoXAttnProcessor2_0(),
    )
    plain.load_state_dict({k: v for k, v in block.attn1.state_dict().items() if not k.startswith("ttt.")})
    total, seen = torch.zeros_like(tokens), torch.zeros(1, tokens.shape[1], 1)
    expected_texts = []
    with torch.no_grad():
        for index in range(3):
            place = slice(index * 2 * 6, (index * 2 + 3) * 6)
            out, out_text = plain(
                tokens[:, place], encoder_hidden_states=texts[:, index * 5 : index * 5 + 5], image_rotary_emb=rotary
            )
            total[:, place] += out
            seen[:, place] += 1
            expected_texts.append(out_text)
    assert torch.equal(found, total / seen)
    assert torch.equal(found_texts, torch.cat(expected_texts, 1))


def test_what_lies_in_another_segment_is_not_attended_to() -> None:
    """Without TTT the second segment's text cannot reach the frames that the first has alone, in one block."""
    model, _ = adapted(num_layers=1)
    latents, text, times = video(2)
    with torch.no_grad(), gates_closed(model):
        before = model(latents, text, times).sample
        text[:, 1] += 1
        after = model(latents, text, times).sample
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])  # the frame they share
    with torch.no_grad():
        open_before = model(latents, text, times).sample
        text[:, 1] += 1
        assert not torch.equal(open_before[:, 0], model(latents, text, times).sample[:, 0])


def test_segments_that_share_no_frame() -> None:
    model = build(options(prefix_temporal_length=0), device="cpu", dtype=torch.float32)
    latents, text, times = video(2)
    with torch.no_grad():
        whole = model(latents[:, :4], text, times).sample
        first = model(latents[:, :2], text[:, :1], times).sample
        second = model(latents[:, 2:4], text[:, 1:], times).sample
    torch.testing.assert_close(whole, torch.cat((first, second), 1), rtol=1e-5, atol=1e-6)


# --- reading orders ---


@pytest.mark.parametrize("count", range(1, 22))
@pytest.mark.parametrize("text_length", [1, 2, 7])
def test_interleaving_by_its_definition_and_its_inverse(count: int, text_length: int) -> None:
    layout = Layout(Segments(3), count, text_length, 2, 1)
    cpu = torch.device("cpu")
    texts = [[("text", segment, word) for word in range(text_length)] for segment in range(count)]
    tokens = [(frame, place) for frame in range(layout.frames) for place in range(2)]
    lying = list(itertools.chain(*texts)) + tokens

    def interleaved(texts: list, frames: list) -> list:
        read, start = [], 0
        for segment, text in enumerate(texts):
            stop = start + (4 if segment == 0 else 3) * 2
            read += text + frames[start:stop]
            start = stop
        return read

    forward, backward = layout.reading_order(cpu), layout.backward_order(cpu)
    assert [lying[i] for i in forward.order] == interleaved(texts, tokens)
    assert [lying[i] for i in backward.order] == interleaved(texts[::-1], tokens[::-1])
    values = torch.randn(2, layout.tokens, 3)
    for order in (forward, backward):
        assert torch.equal(order.restore(order.read(values)), values)
        assert torch.equal(order.read(order.restore(values)), values)
    assert len(lying) == layout.tokens


@pytest.mark.parametrize("count", [1, 2, 5])
def test_reversing_twice_is_the_identity(count: int) -> None:
    layout = Layout(Segments(2), count, 3, 2, 2)
    cpu = torch.device("cpu")
    values = torch.randn(1, layout.tokens, 2)
    forward, backward = layout.reading_order(cpu), layout.backward_order(cpu)

    def reversed_video(x: Tensor) -> Tensor:
        return forward.restore(backward.read(x))

    assert not torch.equal(reversed_video(values), values)
    assert torch.equal(reversed_video(reversed_video(values)), values)


def test_rotary_turns_video_tokens_by_their_place_and_texts_not() -> None:
    layout = Layout(Segments(2), 2, 3, 2, 3)
    cos, sin = layout.rotary(32, theta=100.0, device=torch.device("cpu"), dtype=torch.float64)
    order = layout.reading_order(torch.device("cpu")).order
    for read, lies in enumerate(order.tolist()):
        if lies < 6:
            angles = torch.zeros(16, dtype=torch.float64)
        else:
            place = lies - 6
            time, height, width = place // 6, place % 6 // 3, place % 3
            angles = torch.tensor(
                [time * 100.0 ** (-2 * i / 8) for i in range(4)]
                + [height * 100.0 ** (-2 * i / 12) for i in range(6)]
                + [width * 100.0 ** (-2 * i / 12) for i in range(6)],
                dtype=torch.float64,
            )
        torch.testing.assert_close(cos[read], angles.cos(), rtol=0, atol=1e-12)
        torch.testing.assert_close(sin[read], angles.sin(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_backward_on_a_video_is_forward_on_the_reversed_video_reversed(count: int) -> None:
    layout = Layout(Segments(2), count, 3, 2, 2)
    torch.manual_seed(count)
    adapter = BidirectionalTTT(32, 2, video_config(mini_batch_size=4), dtype=torch.float64)
    gates = [module for module in adapter.modules() if isinstance(module, Gate)]
    cpu = torch.device("cpu")
    forward, backward = layout.reading_order(cpu), layout.backward_order(cpu)

    def reversed_video(x: Tensor) -> Tensor:
        return forward.restore(backward.read(x))

    x = torch.randn(2, layout.tokens, 32, dtype=torch.float64)
    one = adapter._direction(x, layout, backward, tuple(gates[:2]))
    other = reversed_video(adapter._direction(reversed_video(x), layout, forward, tuple(gates[:2])))
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    assert (one - x).abs().max() > 1e-3


def test_text_and_video_and_both_directions_have_gates_of_their_own() -> None:
    layout = Layout(Segments(2), 2, 3, 2, 2)
    torch.manual_seed(0)
    adapter = BidirectionalTTT(32, 2, video_config())
    video, text = torch.randn(1, 5 * 4, 32), torch.randn(1, 6, 32)
    names = [f"{direction}_gate_{what}" for direction in ("forward", "backward") for what in ("text", "video")]
    changed = {}
    with torch.no_grad():
        for name in names:
            for other in names:
                getattr(adapter, other).gating_alpha.fill_(0.5 if other == name else 0.0)
            out_video, out_text = adapter(video, text, layout)
            changed[name] = (not torch.equal(out_video, video), not torch.equal(out_text, text))
    assert changed == {name: (name.endswith("video"), name.endswith("text")) for name in names}


# --- sizes ---


def test_cogvideox_5b_has_the_published_sizes() -> None:
    backbone = get_backbone("videodit")
    model = backbone.build(VideoDiTOptions(preset="5b"), device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 5_570_283_072
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    injection = inject.apply(model, backbone.sites(model), video_config(mini_batch_size=64), causal=False)
    assert len(injection.adapters) == 42
    assert sum(t.numel() for t in injection.state_dict().values()) == 1_659_895_776
    assert sum("gating_alpha" in name for name in injection.state_dict()) == 4 * 42


@pytest.mark.parametrize("changes", [{}, {"dim": 96, "num_heads": 2, "num_layers": 3}, {"preset": "5b"}])
def test_facts_count_the_parameters_that_are_there(changes: dict) -> None:
    backbone = get_backbone("videodit")
    config = RunConfig(backbone=VideoDiTOptions(**changes), ttt=video_config(), data=VideoDiTData(duration_sec=6))
    facts = backbone.facts(config)
    model = backbone.build(config.backbone, device="meta", dtype=torch.float32)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    block = model.get_submodule("transformer_blocks.0")
    assert facts.layer_parameters == sum(p.numel() for p in block.parameters())
    named = model.named_parameters()
    assert facts.attention_parameters == sum(p.numel() for name, p in named if backbone.is_attention(name))
    injection = inject.apply(model, backbone.sites(model), config.ttt, causal=False)
    assert estimate(config, facts).adapter_bytes == 4 * sum(t.numel() for t in injection.state_dict().values())


@pytest.mark.parametrize("remat", [(), ("attention",), ("mlp",), ("attention", "mlp"), ("seq_modeling_block",)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_facts_count_what_autograd_keeps_of_a_block(remat: tuple[str, ...], dtype: str) -> None:
    """Against what is kept of a block of width 192 on 216 tokens."""
    kept = []
    for layers in (1, 2):
        chosen = {f"remat_{part}": True for part in remat}
        made = options(dim=192, num_heads=3, num_layers=layers, attn_length=12, **chosen)
        model = build(made, device="cpu", dtype=getattr(torch, dtype))
        latents, text, times = (x[:1] for x in video(1, attn_length=12, dtype=getattr(torch, dtype)))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def keep(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            answer = model(latents, text, times).sample
        kept.append(sum(size for place, size in storages.items() if place not in own))
        del answer
    config = RunConfig(
        backbone=made, ttt=video_config(), data=VideoDiTData(), train=TrainConfig.model_validate({"param_dtype": dtype})
    )
    per_token = get_backbone("videodit").facts(config).layer_activation_bytes
    assert (kept[1] - kept[0]) / (5 + 13 * 6) == pytest.approx(per_token, rel=0.1)


def test_names_are_diffusers_own_and_its_pretrained_folders_load(tmp_path) -> None:
    model = build(options(), device="cpu", dtype=torch.float32)
    plain = CogVideoXTransformer3DModel.from_config(dict(model.config))
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.save_pretrained(tmp_path / "transformer")
    for folder in (tmp_path, tmp_path / "transformer"):
        loaded = build(
            VideoDiTOptions(preset="5b", pretrained=str(folder), attn_length=2), device="cpu", dtype=torch.bfloat16
        )
        assert isinstance(loaded, VideoDiT)
        for name, tensor in plain.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name
    structure = build(VideoDiTOptions(preset="5b", pretrained=str(tmp_path)), device="meta", dtype=torch.float32)
    assert [tuple(p.shape) for p in structure.parameters()] == [tuple(p.shape) for p in plain.parameters()]


# --- rematerialisation ---


def _fraction(parts: tuple[bool, ...]) -> int | None:
    """Whether layers are rematerialised too with these parts: a quarter of all 64 ways, of resolution IV."""
    first, second, third, fourth, fifth = parts
    return second ^ third ^ fourth if fifth == first ^ second ^ third else None


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_five_steps_at_every_combination_of_rematerialised_parts_have_the_same_losses(layers: int) -> None:
    """Eight combinations inside of rematerialised layers, eight without: any three of the six in every way."""
    latents, text, times = (x[:1] for x in video(2, dtype=torch.float64))
    model = build(options(num_layers=2 if layers == 2 else 1), device="cpu", dtype=torch.float64)
    settings = video_config(mini_batch_size=24, scan_checkpoint_group_size=1)  # 40 tokens: two groups, the last short
    inject.apply(model, sites(model), settings, causal=False, seed=1)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def losses(remat: Remat, checkpointing: bool) -> list[float]:
        model.load_state_dict(start)
        model.arrange(Segments(2), remat)
        get_backbone("videodit").set_gradient_checkpointing(model, checkpointing)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(latents, text, times).sample.square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected = losses(Remat(), False)
    assert expected[-1] < 0.9 * expected[0]
    combinations = list(itertools.product([False, True], repeat=5))
    ends = [combinations[0], combinations[-1]]
    for chosen in ends if layers == 2 else [one for one in combinations if one in ends or _fraction(one) == layers]:
        found = losses(Remat(max(layers, 1), *chosen), layers > 0)
        assert found == pytest.approx(expected, rel=1e-9), chosen


@pytest.mark.parametrize(
    ("changes", "layers", "expected"),
    [
        ({}, False, {"attention": 1, "ttt": 2, "mlp": 1}),
        ({}, True, {"attention": 2, "ttt": 4, "mlp": 2}),
        ({"remat_attention": True}, False, {"attention": 2, "ttt": 2, "mlp": 1}),
        ({"remat_forward_ttt": True}, False, {"attention": 1, "ttt": 3, "mlp": 1}),
        ({"remat_reverse_ttt": True}, False, {"attention": 1, "ttt": 3, "mlp": 1}),
        ({"remat_mlp": True}, False, {"attention": 1, "ttt": 2, "mlp": 2}),
        ({"remat_seq_modeling_block": True}, False, {"attention": 2, "ttt": 4, "mlp": 1}),
        ({"remat_seq_modeling_block": True, "remat_attention": True}, False, {"attention": 3, "ttt": 4, "mlp": 1}),
        ({"remat_forward_ttt": True, "remat_reverse_ttt": True}, True, {"attention": 2, "ttt": 6, "mlp": 2}),
    ],
)
def test_each_part_runs_as_often_as_it_is_rematerialised(
    changes: dict, layers: bool, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ttt.layer import TTTLayer

    model, _ = adapted(num_layers=1, **changes)
    get_backbone("videodit").set_gradient_checkpointing(model, layers)
    counts = dict.fromkeys(expected, 0)
    block = model.transformer_blocks[0]
    block.attn1.to_q.register_forward_hook(lambda *_: counts.__setitem__("attention", counts["attention"] + 1))
    block.ff.net[0].register_forward_hook(lambda *_: counts.__setitem__("mlp", counts["mlp"] + 1))
    original = TTTLayer.forward

    def counted(self: TTTLayer, *args: object, **kwargs: object) -> object:
        counts["ttt"] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TTTLayer, "forward", counted)
    latents, text, times = video(1)
    # Inputs that need gradients, so that nothing is left out because nothing upstream learns.
    model(latents.requires_grad_(), text, times).sample.square().mean().backward()
    assert counts == expected
    with torch.no_grad():
        counts.update(dict.fromkeys(counts, 0))
        model(latents, text, times)
    assert counts == {"attention": 1, "ttt": 2, "mlp": 1}


def test_blocks_are_checkpointed_in_groups() -> None:
    model = build(options(num_layers=5, transformer_checkpoint_layer_group_size=2), device="cpu", dtype=torch.float32)
    assert [len(group) for group in model._groups()] == [2, 2, 1]
    assert model.transformer_blocks[0].attn1.remat == Remat(layer_group_size=2)


# --- refusals ---


@pytest.mark.parametrize(
    ("frames", "texts", "said"),
    [
        (4, 1, "4 latent frames are not a whole number of segments: 1, 2 and 3 segments have 3, 5 and 7"),
        (5, 1, "5 latent frames are 2 segments, which need a text each; 1 were given"),
        (1, 1, "1 latent frames are not a whole number of segments"),
    ],
)
def test_a_video_that_does_not_fit_is_refused(frames: int, texts: int, said: str) -> None:
    model = build(options(), device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=said):
        model(torch.zeros(1, frames, 16, 4, 4), torch.zeros(1, texts, 5, 32), torch.tensor([1]))


def test_heads_that_three_dimensions_cannot_share_are_refused() -> None:
    model = build(options(), device="cpu", dtype=torch.float32)
    with pytest.raises(InjectionError, match="heads of width 8 cannot be shared out between time, height and width"):
        inject.apply(model, sites(model), video_config(num_heads=4), causal=False)
    assert not any("ttt" in name for name, _ in model.named_modules())
    injection = inject.apply(model, sites(model), video_config(num_heads=4, rope="none"), causal=False)
    latents, text, times = video(1)
    with torch.no_grad():
        assert torch.isfinite(injection.model(latents, text, times).sample).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_rotary_positional_embeddings": False}, "CogVideoX 2b"),
        ({"patch_size_t": 2}, "CogVideoX 1.5"),
    ],
)
def test_other_cogvideox_are_refused(changes: dict, said: str) -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "use_rotary_positional_embeddings": True,
    }
    with warnings.catch_warnings(), pytest.raises(ValueError, match=said):
        VideoDiT(**{**config, **changes})


# --- which weights ---


def test_the_revision_reaches_all_that_is_loaded_and_no_code_of_a_repository_runs(monkeypatch):
    asked = {}

    def recorder(name):
        def load(*args, **more):
            asked[name] = more
            raise OSError("no network")

        return staticmethod(load)

    for name, owner, method in (
        ("transformer", VideoDiT, "from_pretrained"),
        ("structure", VideoDiT, "load_config"),
        ("vae", diffusers.AutoencoderKLCogVideoX, "from_pretrained"),
        ("t5", transformers.T5EncoderModel, "from_pretrained"),
        ("scheduler", diffusers.CogVideoXDPMScheduler, "load_config"),
    ):
        monkeypatch.setattr(owner, method, recorder(name))
    options = VideoDiTOptions(preset="5b", revision="v2")
    of_others = options.model_copy(update={"pretrained": "others/CogVideoX"})  # whose structure is not known here
    where = {"device": "cpu", "dtype": torch.float32}
    for load in (
        lambda: VideoDiTBackbone().build(options, **where),
        lambda: VideoDiTBackbone().build(of_others, device="meta", dtype=torch.float32),
        lambda: load_vae(options, **where),
        lambda: load_text_encoder(options, text_length=8, **where),
        lambda: schedule_of(options),
    ):
        with pytest.raises(EnvironmentProblem):
            load()
    assert {name: more["revision"] for name, more in asked.items()} == dict.fromkeys(asked, "v2")
    assert len(asked) == 5
    assert asked["t5"]["trust_remote_code"] is False
    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", staticmethod(lambda *_, **__: None))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", recorder("tokenizer"))
    with pytest.raises(EnvironmentProblem):
        load_text_encoder(options, text_length=8, **where)
    assert (asked["tokenizer"]["revision"], asked["tokenizer"]["trust_remote_code"]) == ("v2", False)
    assert encoders_of(options) == "THUDM/CogVideoX-5b@v2"


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"backbone\.revision: is of a repository, and .* is a local folder"):
        source_of(VideoDiTOptions(preset="5b", pretrained=str(tmp_path), revision="v2"))
    with pytest.raises(ValueError, match="revision belongs to preset: 5b"):
        VideoDiTOptions(revision="v2")


def test_the_commit_of_the_hubs_cache_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    options = VideoDiTOptions(preset="5b")
    assert VideoDiTBackbone().provenance(options) == {"repository": "THUDM/CogVideoX-5b"}
    file = tmp_path / "models--THUDM--CogVideoX-5b" / "snapshots" / ("c" * 40) / "transformer" / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    refs = file.parents[3] / "refs"
    refs.mkdir()
    (refs / "main").write_text("c" * 40)
    assert VideoDiTBackbone().provenance(options) == {"repository": "THUDM/CogVideoX-5b", "commit": "c" * 40}
    assert VideoDiTBackbone().provenance(VideoDiTOptions()) == {}


def test_the_inner_loss_has_a_stream_for_each_direction_and_row_in_the_order_of_reading() -> None:
    model, injection = adapted()
    latents, text, times = video(2)
    with InnerCurves(injection) as recorder, torch.no_grad():
        model(latents, text, times)
    curves = recorder.curves()
    assert list(curves) == list(injection.adapters)
    for curve in curves.values():
        assert {losses.shape for losses in curve} == {(4, latents.shape[1] * 6 + 10)}
        assert all((losses > 0).all() for losses in curve)
        first = slice(0, 8)  # before the first mini-batch of 8 closes, nothing is learned
        assert curve.before[:, first] == pytest.approx(curve.w0[:, first], rel=1e-5)
        assert (abs(curve.before - curve.w0)[:, 16:] > 0).any(axis=1).all()
        assert curve.w0[:2] != pytest.approx(curve.w0[2:], rel=1e-2)
