"""Checks, besides the laws, of the plugin methods that `ttt check` and `ttt train` call.

The laws check layers in a model. These check the rest of `ttt.plugins.Backbone` as a user runs it: every preset is
read, its facts are compared with the model on `meta`, the demo's data and loss are used as in training, and a run of
two steps is made, evaluated and loaded again. Each check takes a `Bench` and raises `MethodBrokenError`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttt import plugins
from ttt.adapter import Gate
from ttt.adapter_file import backbone_identity
from ttt.check.load import check_config
from ttt.config import RunConfig
from ttt.config.findings import Finding, Severity, blames_environment
from ttt.errors import EnvironmentProblem, PluginError, TTTError
from ttt.inject import bare_adapter, plan
from ttt.laws.bench import Bench
from ttt.plugins import Backbone, BackboneFacts, Site
from ttt.plugins.data import tensors_in as tensors_in
from ttt.words import first_line

_PLENTY = 1 << 60
"""The memory in bytes that presets are checked for: so large that each of them fits."""


class MethodBrokenError(TTTError):
    """A method of a plugin does not do what `ttt.plugins.Backbone` says; the message begins with its name."""

    def __init__(self, method: str, message: str) -> None:
        super().__init__(f"{method}: {message}")
        self.method = method
        """The method's name, such as `MyBackbone.loss`."""


@contextlib.contextmanager
def method_of(bench: Bench, name: str) -> Iterator[str]:
    """A context that turns errors inside into errors of a plugin's method, with the line; gives the method's name."""
    method = f"{type(bench.backbone).__name__}.{name}"
    try:
        yield method
    except MethodBrokenError:
        raise
    except PluginError as error:  # its message has the place
        raise MethodBrokenError(method, str(error)) from error
    except Exception as error:  # a plugin's code may raise anything
        told = f"{type(error).__name__}: {first_line(error, otherwise='')}"
        raise MethodBrokenError(method, f"fails with {told} ({_place(error, bench.backbone)})") from error


def _place(error: Exception, backbone: Backbone) -> str:
    """File and line of an error: the last in the plugin's own package, or else the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    module = sys.modules.get(type(backbone).__module__)
    folder = str(Path(getattr(module, "__file__", None) or os.devnull).parent)
    own = [frame for frame in frames if frame.filename.startswith(folder)]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def demo_config(bench: Bench, *overrides: str) -> RunConfig:
    """The demo's config, on the bench's device.

    Raises:
        MethodBrokenError: there is no demo, or it cannot be read.
    """
    device = torch.device(bench.device).type
    settings = [f"train.device={device}", *overrides]
    config = read_preset(bench, "demo", settings)
    assert config is not None
    return config


def read_preset(bench: Bench, name: str, overrides: Sequence[str] = ()) -> RunConfig | None:
    """A preset as a config; None if it only lacks files or a device of this machine, which a demo must not."""
    with method_of(bench, "presets") as method:
        presets = bench.backbone.presets()
        if not isinstance(presets, Mapping) or not all(isinstance(text, str) for text in presets.values()):
            raise MethodBrokenError(method, "it must map names of presets to their text")
        if name not in presets:
            raise MethodBrokenError(method, f"there is no preset {name!r}, which `ttt train` and `ttt init` start from")
        checked = check_config(
            f"preset {name}",
            text=presets[name],
            backbone=bench.backbone,
            overrides=overrides,
            memory=_PLENTY,
            training=False,
        )
        errors = [finding for finding in checked.findings if finding.severity is Severity.ERROR]
        if name != "demo":
            errors = [finding for finding in errors if not blames_environment(finding)]
        if errors:
            raise MethodBrokenError(method, f"the preset {name!r} cannot be run: {_in_words(errors[0])}")
        return checked.config


def _in_words(finding: Finding) -> str:
    place = f"line {finding.place.line}, " if finding.place is not None and finding.place.line else ""
    return f"{place}{finding.code} {finding.message}"


# --- without a model ---


def module_imports_no_torch(bench: Bench) -> None:
    """The plugin's entry point, presets, facts and rules work in a fresh process without importing torch.

    A backbone that is not installed has no entry point; nothing is checked for it.

    Raises:
        MethodBrokenError: naming the line that imports torch.
    """
    info = plugins.find(bench.backbone.name)
    if info is None or type(info.backbone) is not type(bench.backbone):
        return
    with tempfile.TemporaryDirectory() as folder:  # nothing is imported from the current folder by chance
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, "-c", _WITHOUT_TORCH, bench.backbone.name, info.module.partition(":")[0]],
            env={**os.environ, "PYTHONPATH": paths},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
    module = info.module.partition(":")[0]
    if done.returncode == _IMPORTED:
        raise MethodBrokenError(
            module,
            f"torch is imported at {done.stdout.strip().splitlines()[-1]}, so that every `ttt check` waits for it; "
            f"import it inside the methods that need it",
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise MethodBrokenError(module, f"cannot be used in a process of its own: {last}")


_IMPORTED = 42
"""The exit code of the process if torch is imported."""
_WITHOUT_TORCH = """
import os, sys, traceback
import ttt.check.catalogue, ttt.check.load, ttt.plugins
ours = os.path.dirname(ttt.__file__)

def watch(event, arguments):
    if event == "import" and arguments[0] == "torch" and "torch" not in sys.modules:
        frames = [f for f in traceback.extract_stack()[:-1] if "importlib" not in f.filename and f.filename[:1] != "<"]
        module = sys.modules.get(sys.argv[2])
        package = os.path.dirname(getattr(module, "__file__", None) or "?")
        theirs = [f for f in frames if f.filename.startswith(package)]
        theirs = theirs or [f for f in frames if not f.filename.startswith(ours)] or frames
        place = f"{theirs[-1].filename}:{theirs[-1].lineno}" if theirs else "an unknown place"
        print(place, file=sys.__stdout__, flush=True)  # what a plugin's import prints goes elsewhere
        os._exit(42)

sys.addaudithook(watch)
backbone = ttt.plugins.get_backbone(sys.argv[1])
for name, text in backbone.presets().items():
    checked = ttt.check.check_config(f"preset {name}", text=text, backbone=backbone, memory=1 << 60)
    if checked.config is not None:
        backbone.facts(checked.config), backbone.has_eval_data(checked.config)
ttt.check.catalogue.explanations_of(backbone), backbone.tiny()
"""


def presets_load(bench: Bench) -> None:
    """Every preset is a config without an error; `demo` is one of them, and lacks nothing on any machine.

    Raises:
        MethodBrokenError: a preset has an unknown key, say; the message has the first finding.
    """
    read_preset(bench, "demo")
    for name in bench.backbone.presets():
        read_preset(bench, name)
    unknown = sorted(bench.backbone.non_identity_options - set(bench.backbone.options.model_fields))
    if unknown:
        raise MethodBrokenError(
            f"{type(bench.backbone).__name__}.non_identity_options", f"the options have no {unknown[0]!r}"
        )


# --- the model and its facts ---


def facts_agree(bench: Bench) -> None:
    """The `facts` of every preset's model, and of the tiny one, agree with the model that `build` makes on `meta`.

    Compares width, heads, layers, parameters, attention parameters and gates. Law 2 checks how often a layer is
    recomputed.

    Raises:
        MethodBrokenError: naming the fact and both numbers.
    """
    built: dict[str, nn.Module] = {}
    configs = {f"preset {name}": read_preset(bench, name) for name in bench.backbone.presets()}
    with method_of(bench, "tiny"):
        configs["tiny()"] = bench.run_config()
    for name, config in configs.items():
        if config is None:
            continue
        with method_of(bench, "facts") as method:
            facts = bench.backbone.facts(config)
            if not isinstance(facts, BackboneFacts):
                raise MethodBrokenError(method, f"it returned {type(facts).__name__}, not BackboneFacts")
        try:
            with method_of(bench, "build"):
                # Presets that differ only in what is recomputed have the same model.
                options = json.dumps([backbone_identity(bench.backbone, config.backbone), _sizes(facts)])
                if options not in built:
                    built[options] = bench.backbone.build(config.backbone, device="meta", dtype=torch.float32)
        except MethodBrokenError as error:
            if isinstance(error.__cause__, EnvironmentProblem) and name not in ("preset demo", "tiny()"):
                continue  # this machine does not have its weights
            raise
        with method_of(bench, "sites"):
            sites = bench.backbone.sites(built[options])
            plan(sites, config.ttt, causal=bench.backbone.causal, model=built[options])
        for fact, said, found in _facts_and_truth(bench, facts, built[options], sites):
            if said != found:
                raise MethodBrokenError(method, f"{name}: it says {fact} {said}, but the model has {found}")


def _sizes(facts: BackboneFacts) -> list[int | None]:
    return [facts.dim, facts.num_heads, facts.num_layers, facts.parameters, facts.attention_parameters]


def _facts_and_truth(
    bench: Bench, facts: BackboneFacts, model: nn.Module, sites: Sequence[Site]
) -> Iterator[tuple[str, Any, Any]]:
    """Each fact that can be read from a model: its name, the stated value, the model's value."""
    yield "num_layers", facts.num_layers, len(sites)
    for site in sites:
        yield f"dim (at {site.path})", facts.dim, site.dim
        yield f"num_heads (at {site.path})", facts.num_heads, site.num_heads
    named = dict(model.named_parameters())
    if facts.parameters is not None:
        yield "parameters", facts.parameters, sum(parameter.numel() for parameter in named.values())
    if facts.attention_parameters is not None:
        attention = [parameter.numel() for name, parameter in named.items() if bench.backbone.is_attention(name)]
        yield "attention_parameters (by is_attention)", facts.attention_parameters, sum(attention)
    if sites:
        adapter = bare_adapter(sites[0], bench.config())
        yield "gates", facts.gates, sum(isinstance(module, Gate) for module in adapter.modules())
    if facts.recordings is not None:
        line = json.loads(facts.recordings.example)
        yield "recordings.example with a `path`", True, isinstance(line, dict) and "path" in line
    if facts.lines is not None:
        line = json.loads(facts.lines.example)
        good = all(isinstance(line.get(key), kind) for key, kind in facts.lines.keys.items())
        yield "lines.example with its keys", True, good


def model_and_batches(bench: Bench) -> None:
    """`build` is deterministic and gives eval mode and the requested type; batches depend on size and seed alone.

    Raises:
        MethodBrokenError: naming the method that breaks this.
    """
    with method_of(bench, "build") as method:
        model, twin = bench.model(), bench.model()
        modes = [name or "the model" for name, module in model.named_modules() if module.training]
        plain = bench.backbone.build(bench.options or bench.backbone.tiny(), device=bench.device, dtype=bench.dtype)
        if modes or plain.training:
            raise MethodBrokenError(method, f"{(modes or ['the model'])[0]} is in training mode; end with model.eval()")
        if not same(dict(model.state_dict()), dict(twin.state_dict())):
            raise MethodBrokenError(method, "the same options and seed give another model the second time")
        if torch.bfloat16 not in {parameter.dtype for parameter in bench.model(torch.bfloat16).parameters()}:
            raise MethodBrokenError(method, "asked for dtype bfloat16, it makes no parameter of that type")
    with method_of(bench, "describe_model"):
        bench.backbone.describe_model(bench.injected().model)
    with method_of(bench, "example_batch") as method:
        batch, again, other = (bench.batch(model, seed=seed) for seed in (0, 0, 1))
        if not same(batch, again):
            raise MethodBrokenError(method, "the same seed gives another batch")
        if same(batch, other):
            raise MethodBrokenError(method, "another seed gives the same batch; draw it from torch.Generator(seed)")
    with method_of(bench, "outputs") as method:
        shape = tuple(bench.outputs(model, batch).shape)
        if len(shape) < 2 or shape[0] != bench.batch_size or (shape[1] < bench.tokens and bench.backbone.causal):
            raise MethodBrokenError(
                method, f"it gives {list(shape)} for {bench.batch_size} rows of {bench.tokens} tokens, not [B, T, …]"
            )
        if not torch.equal(bench.outputs(model, batch), bench.outputs(model, batch)):
            raise MethodBrokenError(method, "a second call gives another answer in eval mode")
    with method_of(bench, "perturb") as method:
        changed = bench.backbone.perturb(batch, token=shape[1] - 1)
        if not same(batch, again):
            raise MethodBrokenError(method, "it writes to the batch that it is given; change a copy")
        if same(changed, batch):
            raise MethodBrokenError(method, "it changes nothing")


# --- helpers, also of other checks ---


def same(one: Any, other: Any) -> bool:
    """Whether two nested structures hold the same values; NaN counts as equal to NaN."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())  # the second part is for NaN
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
