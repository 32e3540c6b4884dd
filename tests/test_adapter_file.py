"""Law 9: an adapter file alone says what it belongs to, and goes into nothing else."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import ToyBackbone, ToyOptions

from ttt import inject
from ttt.adapter_file import (
    BACKBONE,
    CONFIG,
    MODEL,
    backbone_identity,
    fingerprint,
    load_adapter,
    read_info,
    same_weights,
    save_adapter,
    weights_fingerprint,
)
from ttt.checkpoint_folder import step_folder, write_record
from ttt.config import TTTConfig
from ttt.errors import AdapterFileError, AdapterMismatchError, DamagedFileWarning, EnvironmentProblem
from ttt.files import write_tensors

BACKEND = ToyBackbone()
OPTIONS = ToyOptions(name="toy", num_layers=3, dim=16, num_heads=2)
SETTINGS = {"mini_batch_size": 4, "layers": [0, 2], "initial_gating_alpha": 0.5}


def build(dtype=torch.float32, **changes):
    return BACKEND.build(OPTIONS.model_copy(update=changes), device="cpu", dtype=dtype)


def injected(settings=SETTINGS, *, seed=0, **changes):
    model = build(**changes)
    return inject.apply(model, BACKEND.sites(model), TTTConfig(**settings), seed=seed)


def outputs(model):
    with torch.no_grad():
        return BACKEND.outputs(model, BACKEND.example_batch(model, batch_size=2, tokens=11, seed=0))


@pytest.fixture
def saved(tmp_path):
    injection = injected(seed=5)
    save_adapter(tmp_path, injection, backbone=backbone_identity(BACKEND, OPTIONS), training={"step": 7})
    return tmp_path, outputs(injection.model)


def test_into_a_plain_model_by_the_files_own_settings(saved):
    folder, expected = saved
    model = build()
    assert not torch.equal(outputs(model), expected)
    injection = load_adapter(folder, model, sites=BACKEND.sites(model), backbone=backbone_identity(BACKEND, OPTIONS))
    assert sorted(injection.adapters) == ["layers.0.ttt", "layers.2.ttt"]
    assert injection.config == TTTConfig(**SETTINGS)
    assert torch.equal(outputs(model), expected)


def test_into_an_injected_model_and_from_the_tensors_file_alone(saved, tmp_path_factory):
    folder, expected = saved
    alone = tmp_path_factory.mktemp("alone") / "renamed.safetensors"
    alone.write_bytes((folder / MODEL).read_bytes())
    injection = injected({**SETTINGS, "scan_checkpoint_group_size": 1_000_000}, seed=1)
    assert load_adapter(alone, injection.model, injection=injection) is injection
    assert torch.equal(outputs(injection.model), expected)


def test_a_bfloat16_backbone_takes_an_adapter_of_the_same_weights_in_float32(saved):
    folder, _ = saved
    model = build(dtype=torch.bfloat16)
    injection = load_adapter(folder, model, sites=BACKEND.sites(model))
    assert all(parameter.dtype == torch.float32 for parameter in injection.state_dict().values())


def test_info_says_what_it_is(saved):
    folder, _ = saved
    info = read_info(folder)
    assert info.ttt == TTTConfig(**SETTINGS)
    assert info.backbone["name"] == "toy"
    assert info.backbone["num_layers"] == 3
    assert [(site.layer, site.name, site.dim, site.num_heads) for site in info.sites] == [
        (0, "layers.0.ttt", 16, 2),
        (2, "layers.2.ttt", 16, 2),
    ]
    assert info.training == {"step": 7}
    assert info.parameters == sum(tensor.numel() for tensor in load_file(folder / MODEL).values())
    assert json.loads((folder / CONFIG).read_text())["ttt"]["mini_batch_size"] == 4


def test_info_needs_no_torch(saved):
    folder, _ = saved
    code = (
        "import sys; from ttt.adapter_file import read_info; read_info(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_a_runs_adapter_is_read_and_compared_without_the_trainer(saved, tmp_path_factory):
    folder, _ = saved
    run = tmp_path_factory.mktemp("run")
    for step in (3, 12):
        shutil.copytree(folder, step_folder(run, step))
        write_record(step_folder(run, step), step, {})
    (step_folder(run, 12) / CONFIG).unlink()
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); from ttt.adapter_file import read_info; "
        "info = read_info(sys.argv[1], verify=True); print(info.path); "
        "print(sorted(name for name in sys.modules if name == 'torch' or name.startswith('ttt.train')))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(run)], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [str(step_folder(run, 3) / MODEL), "[]"]
    with pytest.warns(DamagedFileWarning, match=r"step_000012/adapter_config.json: missing; .*step_000003 is taken"):
        read_info(run)


OTHER_SETTINGS = {
    "layer_type": "mlp",
    "mini_batch_size": 8,
    "base_lr": 0.5,
    "qkvo_bias": True,
    "normalize_qk": True,
    "normalize_target": True,
    "rope": "none",
    "rope_theta": 500.0,
    "learnable_token_idx": False,
    "ln_eps": 1e-5,
    "target_eps": 1e-5,
    "input_norm": "rms",
    "initial_gating_alpha": 0.2,
    "persistent_states": True,
    "layers": [0, 1],
    "num_heads": 4,
}


@pytest.mark.parametrize("key", OTHER_SETTINGS)
def test_another_setting_is_refused_by_name_and_changes_nothing(saved, key):
    folder, _ = saved
    beside = {"normalize_target": True} if key == "target_eps" else {}
    injection = injected({**SETTINGS, **beside, key: OTHER_SETTINGS[key]}, seed=1)
    before = {name: tensor.clone() for name, tensor in injection.model.state_dict().items()}
    with pytest.raises(AdapterMismatchError, match=key):
        load_adapter(folder, injection.model, injection=injection)
    assert all(torch.equal(tensor, before[name]) for name, tensor in injection.model.state_dict().items())


def test_a_non_causal_layer_is_refused(tmp_path):
    settings = {**SETTINGS, "learnable_token_idx": False, "rope": "none"}
    save_adapter(tmp_path, injected(settings), backbone={"name": "toy"})
    model = build()
    other = inject.apply(model, BACKEND.sites(model), TTTConfig(**settings, causal=False), causal=False)
    with pytest.raises(AdapterMismatchError, match=r"ttt\.causal: true in the file, false here"):
        load_adapter(tmp_path, model, injection=other)


def test_every_setting_of_the_schema_is_compared_or_said_not_to_matter():
    from ttt.adapter_file.differences import free_settings

    mlp_only = {"mlp_layers", "mlp_expansion_factor", "mlp_hidden_dims"}
    assert set(TTTConfig.model_fields) == {*OTHER_SETTINGS, *free_settings(as_start=False), *mlp_only, "causal"}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"mlp_layers": 3}, "mlp_layers"),
        ({"mlp_expansion_factor": 2.0}, "mlp_expansion_factor"),
        ({"mlp_hidden_dims": [24]}, "mlp_hidden_dims"),
    ],
)
def test_another_inner_mlp_is_refused(tmp_path, settings, key):
    save_adapter(tmp_path, injected({**SETTINGS, "layer_type": "mlp"}), backbone={"name": "toy"})
    other = injected({**SETTINGS, "layer_type": "mlp", **settings})
    with pytest.raises(AdapterMismatchError, match=rf"ttt\.{key}: .* in the file, .* here.*W1: shape|ttt\.{key}"):
        load_adapter(tmp_path, other.model, injection=other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_eps": 1e-5}, "target_eps acts on the normalised target; write normalize_target: true"),
        ({"target_eps": 1e-46, "normalize_target": True}, "greater than or equal to"),
        ({"ln_eps": 1e-46}, "greater than or equal to"),  # 0 in float32, and NaN of a constant token
    ],
)
def test_an_epsilon_that_would_do_nothing_or_divide_by_zero_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TTTConfig(**settings)


def test_every_difference_is_named_at_once(saved):
    folder, _ = saved
    model = build(num_layers=2, dim=32)
    with pytest.raises(AdapterMismatchError) as caught:
        load_adapter(
            folder,
            model,
            sites=BACKEND.sites(model),
            backbone={**backbone_identity(BACKEND, OPTIONS), "name": "other", "dim": 32, "num_layers": 2},
        )
    message = str(caught.value)
    for part in (
        'backbone.name: "toy" in the file, "other" here',
        "backbone.dim: 16",
        "backbone.num_layers: 3",
        "layer 2",
    ):
        assert part in message
    assert not any(".ttt." in name for name in model.state_dict())
    assert len(message.splitlines()) == 1


def test_another_width_is_refused_and_the_model_left_plain(saved):
    folder, _ = saved
    model = build(dim=32)
    with pytest.raises(AdapterMismatchError, match=r"layer 0: dim: 16 in the file, 32 here"):
        load_adapter(folder, model, sites=BACKEND.sites(model))
    assert model.state_dict().keys() == build(dim=32).state_dict().keys()
    assert type(model.layers[0]) is type(build().layers[0])


def test_other_backbone_weights_are_refused_unless_told(saved):
    folder, _ = saved
    model = build(seed=1)
    with pytest.raises(AdapterMismatchError, match="weights"):
        load_adapter(folder, model, sites=BACKEND.sites(model))
    load_adapter(folder, model, sites=BACKEND.sites(model), check_weights=False)


def test_the_fingerprint_sees_one_changed_matrix_and_no_adapter():
    first, second = injected(seed=0), injected(seed=9)
    assert weights_fingerprint(first) == weights_fingerprint(second)
    with torch.no_grad():
        second.model.layers[1].linear1.weight.mul_(1.5)
    assert not same_weights(weights_fingerprint(first), second)
    rest = {"layers.1.linear1.weight"}
    assert same_weights(weights_fingerprint(first, without=rest), second, without=rest)
    assert not same_weights(weights_fingerprint(first), second, without=rest)  # other parameters are no same weights


def test_the_last_place_of_another_processor_is_no_other_backbone():
    """Weights drawn at random have it; a hash of rounded values would now and then be another."""
    first, second = injected(), injected()
    known = weights_fingerprint(first)
    with torch.no_grad():
        for number, parameter in enumerate(second.model.parameters()):
            other = -math.inf if number % 2 else math.inf
            parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, other)))
        boundary = torch.tensor(1.00390625)  # half way between two values of bfloat16
        first.model.head.weight[0, 0], second.model.head.weight[0, 0] = (
            boundary,
            torch.nextafter(boundary, boundary + 1),
        )
    known = weights_fingerprint(first)
    assert known != weights_fingerprint(second)
    assert same_weights(known, second)
    with torch.no_grad():
        second.model.head.weight.mul_(1.01)
    assert not same_weights(known, second)


def test_a_fingerprint_of_format_1_is_still_known():
    first = injected()
    known = fingerprint._hash_of_weights(first, set())
    assert known.startswith("sha256:")
    assert same_weights(known, first)
    assert not same_weights(known, injected_with_other_weights())
    assert not same_weights("bf16:nonsense", first)


def injected_with_other_weights():
    other = injected()
    with torch.no_grad():
        other.model.layers[0].linear2.weight.mul_(1.5)
    return other


@pytest.mark.parametrize("damage", ["missing tensor", "extra tensor", "shape"])
def test_tensors_that_do_not_fit_are_named(saved, damage):
    folder, _ = saved
    header = read_metadata(folder / MODEL)
    tensors = load_file(folder / MODEL)
    name = "layers.0.ttt.layer.W1"
    if damage == "missing tensor":
        del tensors[name]
    elif damage == "extra tensor":
        tensors[name + "x"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:1].clone()
    write_tensors(folder / MODEL, tensors, header)
    model = build()
    with pytest.raises(AdapterMismatchError, match=r"layers\.0\.ttt\.layer\.W1"):
        load_adapter(folder, model, sites=BACKEND.sites(model))
    assert not any(".ttt." in key for key in model.state_dict())


def read_metadata(path):
    from ttt.files import read_header

    return read_header(path).metadata


# --- damaged files ---


def corrupt(folder, how):
    file = folder / MODEL
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut in the header":
        file.write_bytes(content[:100])
    elif how == "cut in the tensors":
        file.write_bytes(content[:-10])
    elif how == "too long":
        file.write_bytes(content + b"\0")
    elif how == "huge header":
        file.write_bytes(b"\xff" * 8 + content[8:])
    elif how == "pickle":
        torch.save({"x": torch.zeros(3)}, file)
    elif how == "no settings":
        save_file(load_file(file), file)
    elif how == "settings not JSON":
        save_file(load_file(file), file, metadata={"format": "ttt-adapter", "adapter_config": "{"})
    elif how == "settings incomplete":
        save_file(load_file(file), file, metadata={"format": "ttt-adapter", "adapter_config": '{"version": 1}'})
    elif how == "json not JSON":
        (folder / CONFIG).write_text('{"format": ')
    elif how == "json a list":
        (folder / CONFIG).write_text("[]")


PLACES = {
    "missing": "no such file|holds no adapter",
    "empty": "an empty file",
    "cut in the header": "cut short",
    "cut in the tensors": "damaged: its header promises",
    "too long": "damaged: its header promises",
    "huge header": "cut short",
    "pickle": "no safetensors file",
    "no settings": "holds no adapter settings",
    "settings not JSON": "do not parse",
    "settings incomplete": "do not parse",
    "json not JSON": r"adapter_config\.json:1:\d+: not JSON",
    "json a list": "not a JSON object",
}


@pytest.mark.parametrize("how", PLACES)
def test_a_damaged_file_is_one_sentence_with_its_place(saved, how):
    folder, _ = saved
    corrupt(folder, how)
    model = build()
    for use in (lambda: read_info(folder), lambda: load_adapter(folder, model, sites=BACKEND.sites(model))):
        with pytest.raises(AdapterFileError, match=PLACES[how]) as caught:
            use()
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not any(".ttt." in key for key in model.state_dict())


def rewrite_settings(folder, change):
    file = folder / MODEL
    header = read_metadata(file)
    settings = json.loads(header["adapter_config"])
    change(settings)
    write_tensors(file, load_file(file), {**header, "adapter_config": json.dumps(settings)})
    (folder / CONFIG).unlink()


def test_a_newer_format_is_refused_with_what_to_install(saved):
    folder, _ = saved
    rewrite_settings(folder, lambda settings: settings.update(version=5, ttt_version="9.1"))
    with pytest.raises(
        AdapterFileError, match=r"adapter format 5, .* reads up to 4; install ttt-adapters 9\.1 or newer"
    ):
        read_info(folder)


def test_an_unknown_setting_is_refused(saved):
    folder, _ = saved
    rewrite_settings(folder, lambda settings: settings["ttt"].update(momentum=0.9))
    with pytest.raises(AdapterFileError, match=r"ttt\.momentum"):
        read_info(folder)


def test_an_edited_json_is_refused_for_it_would_do_nothing(saved):
    folder, _ = saved
    settings = json.loads((folder / CONFIG).read_text())
    settings["ttt"]["mini_batch_size"] = 64
    (folder / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(AdapterFileError, match=r"ttt\.mini_batch_size"):
        read_info(folder)


# --- checksums ---


def test_a_changed_value_is_told_by_every_reader_unless_told_not_to_look(saved):
    folder, _ = saved
    content = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    model = build()
    for use in (
        lambda: read_info(folder, verify=True),
        lambda: load_adapter(folder, model, sites=BACKEND.sites(model)),
    ):
        with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors: damaged: its checksum"):
            use()
    assert not any(".ttt." in key for key in model.state_dict())
    assert read_info(folder).version == 3
    load_adapter(folder, model, sites=BACKEND.sites(model), verify=False)


def test_version_1_has_no_checksum_and_loads_and_version_2_must_have_one(saved):
    folder, expected = saved
    metadata = read_metadata(folder / MODEL)
    del metadata["sha256"]
    tensors = load_file(folder / MODEL)
    (folder / CONFIG).unlink()
    save_file(tensors, folder / MODEL, metadata=metadata)
    with pytest.raises(AdapterFileError, match="damaged: its checksum is gone"):
        read_info(folder, verify=True)
    older = {**metadata, "adapter_config": metadata["adapter_config"].replace('"version": 3', '"version": 1')}
    save_file(tensors, folder / MODEL, metadata=older)
    assert (read_info(folder, verify=True).version, read_info(folder).checksum) == (1, None)
    model = build()
    load_adapter(folder, model, sites=BACKEND.sites(model))
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("normalizes", [True, False])
def test_a_file_from_before_the_targets_own_epsilon_computes_with_the_one_that_it_has(tmp_path, version, normalizes):
    """As those versions wrote it: every setting but `target_eps`, for which `ln_eps` stood."""
    settings = {**SETTINGS, "normalize_target": normalizes, "ln_eps": 0.25}
    trained = injected({**settings, **({"target_eps": 0.25} if normalizes else {})}, seed=5)
    save_adapter(tmp_path, trained, backbone=backbone_identity(BACKEND, OPTIONS))

    def as_it_was(header):
        header["version"] = version
        del header["ttt"]["target_eps"]

    rewrite_settings(tmp_path, as_it_was)
    model = build()
    injection = load_adapter(tmp_path, model, sites=BACKEND.sites(model))
    assert torch.equal(outputs(model), outputs(trained.model))
    assert injection.config.target_eps == (0.25 if normalizes else 1e-8)
    # Into a config of today: only where the value acts does it differ.
    other = injected(settings, seed=1)
    if normalizes:
        with pytest.raises(AdapterMismatchError, match=r"ttt\.target_eps: 0\.25 in the file, 1e-08 here"):
            load_adapter(tmp_path, other.model, injection=other, as_start=True)
    else:
        load_adapter(tmp_path, other.model, injection=other)
        assert torch.equal(outputs(other.model), outputs(trained.model))


def test_a_key_without_a_value_counts_in_the_json_beside(saved):
    folder, _ = saved
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("backbone_trained", "backbone_trainee"))
    with pytest.raises(AdapterFileError, match="backbone_traine"):
        read_info(folder)


HUGE = {
    "hidden widths": {"layer_type": "mlp", "mlp_layers": 3, "mlp_hidden_dims": [1 << 20, 1 << 20]},
    "layers of them": {"layer_type": "mlp", "mlp_layers": 16, "mlp_hidden_dims": [1 << 20] * 15},
    "more than a number holds": {"layer_type": "mlp", "mlp_hidden_dims": [10**9]},
    "heads": {"num_heads": 10**9},
}


@pytest.mark.parametrize("settings", HUGE)
def test_settings_that_ask_for_more_than_the_file_holds_are_refused_before_memory_is_taken(
    tmp_path, settings, monkeypatch
):
    """A file of a kilobyte whose layers would take terabytes."""
    config = {**TTTConfig(**SETTINGS).model_dump(mode="json"), "base_lr": 0.1, **HUGE[settings]}
    content = {
        "format": "ttt-adapter", "version": 2, "ttt_version": "1", "backbone": {"name": "toy"},
        "backbone_weights": None, "backbone_trained": None, "ttt": config, "training": {},
        "sites": [{"layer": n, "name": f"layers.{n}.ttt", "dim": 16, "num_heads": 2} for n in (0, 2)],
    }  # fmt: skip
    metadata = {"format": "ttt-adapter", "adapter_config": json.dumps(content)}
    write_tensors(tmp_path / MODEL, {"layers.0.ttt.layer.W1": torch.zeros(1)}, metadata)
    model = build()

    def taken(*shape, device=None, **_):
        assert str(device) == "meta", f"memory for {shape}"
        return original(*shape, device=device, **_)

    original = torch.empty
    monkeypatch.setattr(torch, "empty", taken)
    with pytest.raises((AdapterMismatchError, AdapterFileError), match=str(tmp_path)) as caught:
        load_adapter(tmp_path, model, sites=BACKEND.sites(model))
    assert "\n" not in str(caught.value)
    assert not any(".ttt." in key for key in model.state_dict())


# --- trained backbone parameters ---


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float64, None),
        (
            torch.float16,
            "in float16 here, not in float32, in which .* load the backbone in float32 (dtype=torch.float32)",
        ),
        (torch.int8, "quantised or stored as int8 here, not in float32, in which .* load the backbone in float32"),
    ],
)
def test_a_backbone_in_another_dtype_is_known_again_or_the_dtype_is_named(saved, dtype, told):
    """float16 rounds otherwise; what is quantised has other values. Before, both were just "other values"."""
    model = build()
    with torch.no_grad():
        model.layers[1].linear1.weight[0, 0] = 1e-7
    first = inject.apply(model, BACKEND.sites(model), TTTConfig(**SETTINGS), seed=5)
    save_adapter(saved[0], first, backbone=backbone_identity(BACKEND, OPTIONS))
    first.eject()
    if dtype == torch.int8:
        weight = model.layers[1].linear1.weight
        model.layers[1].linear1.weight = torch.nn.Parameter((weight * 99).to(dtype), requires_grad=False)
    else:
        model.to(dtype)
    if told is None:
        load_adapter(saved[0], model, sites=BACKEND.sites(model))
        return
    with pytest.raises(AdapterMismatchError) as refused:
        load_adapter(saved[0], model, sites=BACKEND.sites(model))
    assert all(part in str(refused.value) for part in told.split(" .* "))


def test_an_adapter_of_a_float16_backbone_says_so(tmp_path):
    model = build().half()
    injection = inject.apply(model, BACKEND.sites(model), TTTConfig(**SETTINGS), seed=5)
    save_adapter(tmp_path, injection, backbone=backbone_identity(BACKEND, OPTIONS))
    injection.eject()
    load_adapter(tmp_path, model, sites=BACKEND.sites(model)).eject()
    plain = build()
    with pytest.raises(AdapterMismatchError, match=r"float32 here, .* in float16, .*; load the backbone in float16"):
        load_adapter(tmp_path, plain, sites=BACKEND.sites(plain))
    header = read_info(tmp_path)
    assert header.backbone_dtype == "float16"


@pytest.fixture
def saved_with_backbone(tmp_path):
    injection = injected(seed=5)
    trained = dict(injection.model.named_parameters())["layers.1.linear1.weight"]
    with torch.no_grad():
        trained.mul_(2)
    save_adapter(
        tmp_path,
        injection,
        backbone=backbone_identity(BACKEND, OPTIONS),
        backbone_tensors={"layers.1.linear1.weight": trained},
    )
    return tmp_path, outputs(injection.model)


def test_trained_backbone_parameters_load_with_the_adapter(saved_with_backbone):
    folder, expected = saved_with_backbone
    model = build()
    load_adapter(folder, model, sites=BACKEND.sites(model))
    assert torch.equal(outputs(model), expected)


def test_an_adapter_without_the_backbone_it_was_trained_with_is_refused(saved_with_backbone):
    folder, _ = saved_with_backbone
    (folder / BACKBONE).unlink()
    model = build()
    with pytest.raises(AdapterFileError, match=r"backbone_model\.safetensors: missing"):
        load_adapter(folder, model, sites=BACKEND.sites(model))


def test_the_backbone_of_another_checkpoint_is_refused(saved_with_backbone):
    folder, _ = saved_with_backbone
    write_tensors(folder / BACKBONE, load_file(folder / BACKBONE), {"pair": "another"})
    model = build()
    with pytest.raises(AdapterFileError, match="does not belong"):
        load_adapter(folder, model, sites=BACKEND.sites(model))


# --- writing ---


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes there")
def test_files_are_as_readable_as_the_users_umask_has_it(tmp_path):
    before = os.umask(0o027)
    try:
        save_adapter(tmp_path, injected(), backbone={"name": "toy"})
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {
        MODEL: "0o640",
        CONFIG: "0o640",
    }


def test_a_full_disk_leaves_the_old_files_and_nothing_else(saved, monkeypatch):
    import errno

    import safetensors.torch

    folder, _ = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(EnvironmentProblem, match="no space left"):
        save_adapter(folder, injected(seed=1), backbone={"name": "toy"})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("ttt.files.places.free_bytes", lambda path: 100)
    with pytest.raises(EnvironmentProblem, match=r"takes .* but only 100 bytes are free"):
        save_adapter(tmp_path, injected(), backbone={"name": "toy"})
    assert list(tmp_path.iterdir()) == []


def test_exactly_one_of_sites_and_injection(saved):
    folder, _ = saved
    with pytest.raises(TypeError):
        load_adapter(folder, build())
