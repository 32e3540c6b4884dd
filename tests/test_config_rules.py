"""Each code: one config that triggers exactly it, and one beside it that triggers nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from toy_config import ToyBackbone

from ttt.amounts import show_bytes
from ttt.check import check_config, load_config
from ttt.check.catalogue import CODES, DECLARED, explanations
from ttt.config import Finding, TTTConfig
from ttt.config.findings import Family, Severity
from ttt.costs import scan_cost
from ttt.errors import ConfigError, NestedCheckpointWarning
from ttt.machine import device_memory


class Case(NamedTuple):
    """A config in flow style by section, with what it triggers and what beside it does not."""

    code: str
    severity: Severity
    path: str
    bad: str
    good: str
    words: str


ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
CASES = [
    Case("TTT101", ERROR, "ttt.layrs", "ttt: {layrs: all}", "ttt: {layers: all}", "write `layers`"),
    Case("TTT102", ERROR, "train.lr", "train: {lr: fast}", "train: {lr: 1e-5}", "must be a number, not 'fast'"),
    Case(
        "TTT103", ERROR, "ttt.mini_batch_size", "ttt: {mini_batch_size: 0}", "ttt: {mini_batch_size: 1}", "at least 1"
    ),
    Case("TTT104", ERROR, "", "", "backbone: {name: toy}", "names no backbone"),
    Case("TTT105", ERROR, "ttt.lr", "ttt: {lr: 1.0}", "train: {lr: 1.0}", "move it to `train`"),
    Case(
        "TTT106",
        ERROR,
        "ttt.mlp_hidden_dims",
        "ttt: {mlp_hidden_dims: [8, 8]}",
        "ttt: {mlp_layers: 3, mlp_hidden_dims: [8, 8]}",
        "2 widths",
    ),
    Case("TTT111", ERROR, "ttt.layers.1", "ttt: {layers: [0, 4]}", "ttt: {layers: [0, 3]}", "numbered 0 to 3"),
    Case("TTT111", ERROR, "ttt.layers.1", 'ttt: {layers: "0,4"}', 'ttt: {layers: "0,3"}', "layer 4 does not exist"),
    Case("TTT112", ERROR, "ttt.num_heads", "ttt: {num_heads: 5}", "ttt: {num_heads: 8}", "write num_heads: 4 or 8"),
    Case("TTT113", ERROR, "ttt.num_heads", "ttt: {num_heads: 32}", "ttt: {num_heads: 32, rope: none}", "odd number"),
    Case(
        "TTT114",
        ERROR,
        "ttt.mlp_expansion_factor",
        "ttt: {mlp_expansion_factor: 0.01}",
        "ttt: {mlp_expansion_factor: 0.125}",
        "write mlp_expansion_factor: 0.125 or more",
    ),
    Case(
        "TTT201",
        WARNING,
        "ttt.scan_checkpoint_group_size",
        "ttt: {scan_checkpoint_group_size: 1, mini_batch_size: 1}",
        "ttt: {scan_checkpoint_group_size: 2, mini_batch_size: 1}",
        "A window of 64 tokens at mini_batch_size: 1 is 64 of them",
    ),
    Case(
        "TTT201",
        NOTE,
        "ttt.scan_checkpoint_group_size",
        "ttt: {scan_checkpoint_group_size: 1}",
        "ttt: {scan_checkpoint_group_size: 2}",
        "of all groups it needs the least memory",
    ),
    Case(
        "TTT202",
        NOTE,
        "train.gradient_checkpointing",
        "{ttt: {scan_checkpoint_group_size: 2}, train: {gradient_checkpointing: true}}",
        "{ttt: {scan_checkpoint_group_size: 0}, train: {gradient_checkpointing: true}}",
        "forward 3 times",
    ),
    Case(
        "TTT301",
        ERROR,
        "ttt.causal",
        "ttt: {causal: false, learnable_token_idx: false, rope: none}",
        "ttt: {causal: false, learnable_token_idx: false, rope: none, mini_batch_size: 1}",
        "15 tokens after it",
    ),
    Case("TTT301", ERROR, "ttt.preset", "ttt: {preset: video}", "ttt: {preset: lm}", "causal: false"),
    Case(
        "TTT302",
        ERROR,
        "data.shuffle",
        "{ttt: {persistent_states: true}, data: {shuffle: true}}",
        "{ttt: {persistent_states: true}, data: {shuffle: false}}",
        "random order",
    ),
    Case(
        "TTT302",
        ERROR,
        "ttt.persistent_states",
        "ttt: {persistent_states: true}",
        "{ttt: {persistent_states: true}, data: {shuffle: files}}",
        "the default",
    ),
    Case(
        "TTT303",
        WARNING,
        "ttt.mini_batch_size",
        "ttt: {mini_batch_size: 65}",
        "ttt: {mini_batch_size: 64}",
        "64 tokens, fewer than one mini-batch of 65",
    ),
    Case(
        "TTT501",
        ERROR,
        "data.eval_data",
        "data: {eval_data: nowhere.jsonl}",
        "data: {eval_data: here.jsonl}",
        "does not exist",
    ),
    Case(
        "TTT502",
        NOTE,
        "data.train_data",
        "data: {train_data: here.jsonl}",
        "data: {train_data: here.jsonl, eval_data: there.jsonl}",
        "memorising",
    ),
    Case(
        "TTT502",
        WARNING,
        "data.eval_data",
        "data: {train_data: here.jsonl, eval_data: here.jsonl}",
        "data: {eval_data: here.jsonl}",
        "held out",
    ),
    Case(
        "TTT503",
        WARNING,
        "eval.eval_freq",
        "{train: {max_steps: 5}, eval: {eval_freq: 6}}",
        "{train: {max_steps: 5}, eval: {eval_freq: 5}}",
        "a run of 5",
    ),
    Case(
        "TTT517",
        WARNING,
        "train.ckpt_freq",
        "train: {max_steps: 5, ckpt_freq: 6}",
        "train: {max_steps: 5, ckpt_freq: 5}",
        "a checkpoint every 6 steps never comes in a run of 5",
    ),
    Case(
        "TTT517",
        NOTE,
        "train.log_freq",
        "train: {max_steps: 5, log_freq: 6}",
        "train: {max_steps: 5, log_freq: 5}",
        "only the first step and the last have one",
    ),
    Case(
        "TTT517",
        NOTE,
        "train.evidence_freq",
        "train: {max_steps: 5, evidence_freq: 6}",
        "train: {max_steps: 5, evidence_freq: 10}",  # the default
        "a measurement of the layers every 6 steps",
    ),
    Case("TTT601", ERROR, "run_dir", "run_dir: here.jsonl/run", "run_dir: new/run", "here.jsonl is a file"),
    Case(
        "TTT701",
        WARNING,
        "train.warmup_steps",
        "train: {warmup_steps: 6, max_steps: 5}",
        "train: {warmup_steps: 5, max_steps: 5}",
        "83% of train.lr",
    ),
    Case(
        "TTT702",
        ERROR,
        "ttt.layers",
        "ttt: {layers: none}",
        "{ttt: {layers: none}, train: {trainable: all}}",
        "nothing",
    ),
    Case("TTT702", ERROR, "ttt.layers", "ttt: {layers: []}", "ttt: {layers: [0]}", "nothing learns"),
    Case(
        "TTT706",
        WARNING,
        "train.autocast",
        "train: {autocast: bfloat16, param_dtype: bfloat16}",
        "train: {autocast: bfloat16}",
        "spares nothing",
    ),
    Case(
        "TTT707",
        WARNING,
        "train.lr",
        "train: {lr: 2e-6, max_steps: 2000, min_lr_ratio: 4e-6, warmup_steps: 100}",  # as moshi-finetune tunes LoRA
        "train: {lr: 2e-6, max_steps: 2000, min_lr_ratio: 4e-6, warmup_steps: 100, weight_lr_multiplier: 50.0}",
        "write weight_lr_multiplier: 1.5 or more, or lr: 1e-4",
    ),
    Case("TTT707", WARNING, "train.lr", "train: {lr: 1e-6, max_steps: 1000}", "train: {lr: 1e-4}", "start at random"),
    Case(
        "TTT707",
        WARNING,
        "train.lr",
        "train: {lr: 1e-6, max_steps: 1000, lr_schedule: constant, optimizer: muon}",
        "train: {lr: 1e-4, optimizer: muon}",
        "moves their matrices by about 0.0002 in 1000 steps",
    ),
    Case(
        "TTT707",
        WARNING,
        "train.weight_lr_multiplier",
        "train: {weight_lr_multiplier: 0.0}",
        "train: {weight_lr_multiplier: 1.0}",
        "write weight_lr_multiplier: 1.0 or more",
    ),
    Case("TTT707", WARNING, "train.lr", "train: {lr: 2e-6}", "train: {lr: 2e-6, max_steps: 50000}", "new TTT layers"),
    Case(
        "TTT707", WARNING, "train.lr", "train: {lr: 2e-5, max_steps: 3}", "train: {lr: 1e-4, max_steps: 3}", "3 steps"
    ),
    Case("TTT801", ERROR, "backbone.name", "backbone: {name: toys}", "backbone: {name: toy}", "no backbone 'toys'"),
]
ELSEWHERE = {
    # where they are tested: with the reading of files, with other backbones, with overrides and with broken plugins
    **dict.fromkeys((*(f"TTT0{number:02}" for number in range(1, 14)), "TTT108"), "test_config_source.py"),
    **dict.fromkeys(("TTT107", "TTT802", "TTT803"), "test_config_load.py"),
    # with their environments, below
    **dict.fromkeys(("TTT602", "TTT603", "TTT604"), "test_config_rules.py"),
}


def test_every_code_has_its_case() -> None:
    # the laws' codes are tested with the probe, and every other again with its explanation's own configs
    laws = {number for number, code in DECLARED.items() if code.family is Family.LAWS}
    assert {case.code for case in CASES} | set(ELSEWHERE) | set(explanations()) - laws == set(CODES) - laws
    for code, file in ELSEWHERE.items():
        assert code in (Path(__file__).parent / file).read_text(encoding="utf-8")


def _findings(text: str, *, named: bool = True) -> Sequence[Finding]:
    backbone = ToyBackbone() if named else None
    try:
        return load_config("c.yaml", text=text or "run_dir: null", backbone=backbone).findings
    except ConfigError as error:
        return error.findings


@pytest.fixture(autouse=True)
def _folder_with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    (tmp_path / "there.jsonl").touch()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code} {case.bad}")
def test_triggers_exactly_its_code(case: Case) -> None:
    (finding,) = [
        finding
        for finding in _findings(case.bad, named=case.code not in ("TTT104", "TTT801"))
        if (finding.code, finding.path) != ("TTT106", "backbone.name")
    ]
    assert (finding.code, finding.severity, finding.path) == (case.code, case.severity, case.path)
    assert case.words in f"{finding.message}\n{finding.fix}"
    assert finding.place is not None
    assert finding.place.file == "c.yaml"
    assert not finding.message.endswith(".")
    assert finding.fix or case.code == "TTT106"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code} {case.good}")
def test_what_is_beside_it_triggers_nothing(case: Case) -> None:
    assert _findings(case.good) == ()


@pytest.mark.parametrize("layer_type", ["linear", "mlp"])
@pytest.mark.parametrize(("mini_batch", "tokens"), [(1, 64), (1, 3), (2, 37), (4, 64), (16, 64), (32, 64), (3, 300)])
def test_groups_of_one_are_judged_by_the_numbers(layer_type: str, mini_batch: int, tokens: int) -> None:
    ttt = f"{{layer_type: {layer_type}, mini_batch_size: {mini_batch}, scan_checkpoint_group_size: 1, layers: [0]}}"
    checked = check_config("c.yaml", text=f"ttt: {ttt}\ndata: {{window_tokens: {tokens}}}", backbone=ToyBackbone())
    (finding,) = [finding for finding in checked.findings if finding.code == "TTT201"]
    assert checked.config is not None
    scan = scan_cost(checked.config.ttt, dim=32, num_heads=4, tokens=tokens, batch_size=1)
    peaks = {group: scan.with_group_size(group).peak_bytes for group in range(scan.steps)}
    least = min(peaks.values())
    if peaks[1] == least:
        assert finding.severity is NOTE
        assert finding.replacement is None
        assert f"the least memory, {show_bytes(least)}" in finding.message
    else:
        assert finding.severity is WARNING
        assert finding.replacement is not None
        assert peaks[int(finding.replacement)] == least
        assert f"need {show_bytes(least)}" in finding.message or f"needs {show_bytes(least)}" in finding.message
    assert ("worst of both" in finding.message) == (peaks[1] > least and peaks[1] >= peaks[0])


def test_the_schema_alone_says_of_groups_of_one_what_is_always_true() -> None:
    with pytest.warns(NestedCheckpointWarning, match="every carry is kept, as with 0, and every inner step still runs"):
        TTTConfig(scan_checkpoint_group_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TTTConfig(scan_checkpoint_group_size=1, mini_batch_size=188)  # one mini-batch is one checkpoint anyway


def test_without_layers_nothing_is_said_about_them() -> None:
    text = """
        ttt: {layers: none, num_heads: 5, scan_checkpoint_group_size: 1, mini_batch_size: 500, preset: video}
        train: {trainable: all, gradient_checkpointing: true}
        """
    assert _findings(text) == ()


def test_data_paths_that_no_system_has_are_missing_too() -> None:
    (finding,) = _findings(f"data: {{eval_data: '{'x' * 5000}'}}")
    assert finding.code == "TTT501"
    (finding,) = _findings("data: {eval_data: ~/here.jsonl}")
    assert "~ is not expanded" in finding.message


def test_a_run_dir_that_no_system_has_is_refused() -> None:
    (finding,) = _findings(f"run_dir: {'x' * 5000}")
    assert finding.code == "TTT601"


@pytest.mark.parametrize(
    ("environment", "text", "said"),
    [
        ("WORLD_SIZE=2", "{}", "there is no RANK, no MASTER_ADDR, no MASTER_PORT, so the processes cannot find"),
        ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=a", "{}", "there is no MASTER_PORT"),
        ("WORLD_SIZE=2 RANK=2 MASTER_ADDR=a MASTER_PORT=1", "{}", "RANK=2: ranks count from 0 to 1"),
        ("WORLD_SIZE=2 RANK=x MASTER_ADDR=a MASTER_PORT=1", "{}", "RANK=x is not a whole number"),
        ("OMPI_COMM_WORLD_SIZE=4", "{}", "mpirun started 4 processes, but there is no WORLD_SIZE"),
        ("WORLD_SIZE=1 OMPI_COMM_WORLD_SIZE=4", "{}", None),
        ("WORLD_SIZE=1", "{}", None),
        ("WORLD_SIZE=", "{}", None),
        ("WORLD_SIZE=two", "{}", None),
        ("@2", "{train: {batch_size: 2}}", None),
        ("@2", "{train: {batch_size: 3}}", "the 3 rows of a forward pass cannot be divided evenly among 2 processes"),
        ("@2", "{train: {batch_size: 1, parallel: {tensor: 2}}}", None),
        ("@4", "{train: {batch_size: 4, parallel: {shard: 3}}}", "4 processes were started, but the sizes make"),
        ("@4", "{train: {batch_size: 2, parallel: {shard: 2, tensor: 2}}}", None),
        (
            "",
            "{train: {batch_size: 2, parallel: {replicate: 2, shard: 2}}}",
            "among 4 processes (replicate",
        ),
        ("", "{train: {batch_size: 2, parallel: {shard: 8}}}", None),
        ("", "{train: {parallel: {tensor: 3}}}", "heads of a TTT layer cannot be divided evenly among 3 processes"),
        ("", "{train: {parallel: {tensor: 3}}, ttt: {num_heads: 3}}", None),
        ("", "{train: {parallel: {tensor: 2}, trainable: all}, ttt: {layers: none}}", "and no layer has TTT"),
        ("", "{train: {parallel: {tensor: 2}, compile: true}}", "are not compiled"),
    ],
)
def test_processes_that_cannot_share_a_run_are_refused(
    environment: str, text: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment.startswith("@"):
        environment = f"WORLD_SIZE={environment[1:]} RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
    for entry in environment.split():
        monkeypatch.setenv(*entry.split("="))
    found = [finding for finding in _findings(text) if finding.code == "TTT602"]
    assert [said in finding.message for finding in found if said] == [True] * bool(said)
    assert bool(found) == bool(said)


@pytest.mark.parametrize(
    ("forced", "text", "refused"),
    [
        ("generic", "train: {compile: true}", True),
        ("reference", "train: {compile: true}", True),
        ("generic", "train: {compile: false}", False),
        ("generic", "{train: {compile: true, trainable: all}, ttt: {layers: none}}", False),
        ("fused", "train: {compile: true}", False),
        ("", "train: {compile: true}", False),
    ],
)
def test_only_the_fused_scan_is_compiled(
    forced: str, text: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTT_OPS", forced)
    monkeypatch.setenv("CXX", str(_program(tmp_path / "compile-it")))
    found = [(finding.code, finding.path, finding.value) for finding in _findings(text)]
    assert found == ([("TTT603", "train.compile", forced)] if refused else [])


def _program(path: Path) -> Path:
    path.write_text("#!/bin/sh\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("device", "present", "words"),
    [
        ("cpu", {"g++"}, None),
        ("cpu", {"gcc", "clang"}, "there is no g++"),
        ("cuda", {"triton", "gcc"}, None),
        ("cuda", {"triton", "clang"}, None),
        ("cuda", {"g++", "gcc"}, "triton is not installed"),
        ("cuda", {"triton"}, "there is no gcc or clang"),
        ("auto", {"g++"}, None),
        ("auto", {"triton", "gcc"}, None),
        ("auto", {"triton"}, "there is no g++; Triton needs a C compiler"),
        ("auto", set(), "there is no g++; torch.compile makes Triton kernels"),
    ],
)
def test_compiling_needs_a_compiler_for_the_device(
    device: str, present: set[str], words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in present - {"triton"}:
        _program(programs / name)
    monkeypatch.setenv("PATH", str(programs))
    for variable in ("CC", "CXX", "TTT_OPS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    spec = "a spec" if "triton" in present else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == "triton" else None)
    found = _findings(f"train: {{compile: true, device: {device}}}")
    assert _findings(f"train: {{compile: false, device: {device}}}") == ()
    if words is None:
        assert found == ()
        return
    (finding,) = found
    assert (finding.code, finding.path, finding.severity) == ("TTT604", "train.compile", ERROR)
    assert words in finding.message
    assert "write compile: false" in finding.fix


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_compiler_that_is_named_is_the_one_that_must_be_there(
    device: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "a spec")
    text = f"train: {{compile: true, device: {device}}}"
    monkeypatch.setenv(variable, str(_program(tmp_path / "own")))
    assert _findings(text) == ()
    monkeypatch.setenv(variable, "a-compiler-that-nobody-has")
    (finding,) = _findings(text)
    assert "there is no a-compiler-that-nobody-has" in finding.message


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.9.1", True), ("2.10.0+cpu", True), ("2.11.0", False), ("2.13.0", False), ("3.0", False)],
)
def test_compiling_needs_a_pytorch_that_takes_a_layer_whole(
    version: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt.machine.importlib.metadata.version", lambda package: version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "a spec")
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, str(_program(tmp_path / variable)))
    for device in ("cpu", "cuda", "auto"):
        found = _findings(f"train: {{compile: true, device: {device}}}")
        if not old:
            assert found == ()
            continue
        (finding,) = found
        assert (finding.code, finding.path, finding.severity) == ("TTT604", "train.compile", ERROR)
        assert finding.message.count(f"torch.compile of PyTorch {version} cannot take a TTT layer whole") == 1
        assert finding.fix == "upgrade torch to 2.11 or newer, or write compile: false"


def test_a_run_for_this_machines_cpu_is_held_against_its_memory() -> None:
    memory = device_memory("cpu")
    assert memory is not None
    assert memory > 1 << 28
    text = "backbone: {name: moshi}\ntrain: {device: cpu, batch_size: 1000000}\n"
    (finding,) = check_config("c.yaml", text=text).findings
    assert finding.code == "TTT401"
    assert f"there are {show_bytes(memory)}" in finding.message
    assert check_config("c.yaml", text=text.replace("1000000", "1")).findings == ()


def test_a_fix_for_memory_is_about_the_part_that_is_too_large() -> None:
    text = "backbone: {name: moshi, preset: 7b, random_weights: true}\nttt: {layers: [31]}\n" + (
        "train: {batch_size: 4, param_dtype: bfloat16}\ndata: {duration_sec: 15, train_data: here.jsonl}\n"
    )
    for memory, words in ((4, "take a device of"), (20, "write gradient_checkpointing: true, or batch_size: 2")):
        findings = check_config("c.yaml", text=text, memory=memory << 30).findings
        (finding,) = [finding for finding in findings if finding.code.startswith("TTT4")]
        assert words in finding.fix
