"""From a file to a run: read, fill in defaults, validate, check. One pass reports every finding of a file."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ttt import plugins
from ttt.check.codes import REINSTALL, TTT106, TTT605, TTT802, TTT803
from ttt.check.named import named_backbone
from ttt.check.placing import in_order, placed
from ttt.check.possible import impossible_size
from ttt.check.reading import found_again, read_source
from ttt.check.render import render_text
from ttt.check.rules import reliable, run_rules
from ttt.check.rules.of_plugins import as_rule, found_by, house_rules
from ttt.check.rules.rule import Context
from ttt.check.validation import Validated, validate
from ttt.config.findings import Code, Finding, Severity, blames_environment, has_errors, summary
from ttt.config.places import KeyPath
from ttt.config.schema import RunConfig, with_its_target_eps
from ttt.config.source import Source, parse_source
from ttt.errors import ConfigEnvironmentError, ConfigError, EnvironmentProblem, PluginError, TTTError
from ttt.plugins import Backbone, BackboneFacts, NeededFile
from ttt.plugins.asking import WAY_OUT, asked, in_one_line
from ttt.plugins.registry import Plugin
from ttt.plugins.rules import Rule
from ttt.plugins.run_config import run_config_model, with_defaults
from ttt.printable import printable

_SECTIONS = tuple(name for name in RunConfig.model_fields if name not in ("adapter", "run_dir"))


@dataclass(frozen=True)
class LoadedConfig:
    """A config that can be run."""

    config: RunConfig
    """Resolved, defaults included."""
    backbone: Backbone
    findings: tuple[Finding, ...]
    """Warnings and notes, in the order of the file."""
    source: Source
    """What was written, and where."""


@dataclass(frozen=True)
class CheckedConfig:
    """The result of a check, whether the config can be run or not."""

    findings: tuple[Finding, ...]
    """Errors, warnings and notes, in the order of the file."""
    source: Source
    """What was written, and where."""
    config: RunConfig | None
    """Resolved, defaults included; None if the file, a section or a key does not say what the user meant."""
    backbone: Backbone | None
    """None if the config names no backbone, or one that does not work."""


def check_config(
    path: str | Path | None,
    *,
    text: str | bytes | None = None,
    backbone: Backbone | str | None = None,
    overrides: Sequence[str] = (),
    memory: int | None = None,
    devices: int | None = None,
    cost: bool = False,
    resuming: bool = False,
    training: bool = True,
    tasks: bool | None = None,
) -> CheckedConfig:
    """Read, resolve and check a config. Imports no torch and builds no model.

    Args:
        path: the file; with `text`, the name that findings show for it.
        text: the config itself, instead of a file.
        backbone: for configs that do not name one. A config that names another is refused.
        overrides: `section.key=value`, values as YAML; they replace what the config says.
        memory: bytes of memory of the run's device. If None, ask this machine for its own devices.
        devices: how many devices of that memory the run is for: add what it needs on them, in each layout.
        cost: add a note that says what the run costs.
        resuming: whether an interrupted run goes on. It has its weights and does not read `train.init_from` again.
        training: whether the config is for training. If not, house rules are left out.
        tasks: whether evaluation tasks are looked up; None does so for training.

    Raises:
        EnvironmentProblem: the file is missing or cannot be read.
        ValueError: neither `path` nor `text` is given.
    """
    if text is not None:
        source = parse_source(text, file=str(path) if path is not None else "<text>")
    elif path is not None:
        source = read_source(path)
    else:
        raise ValueError("a config is read from a path or a text")
    looked_up = training if tasks is None else tasks
    return _Check(source, overrides, memory, devices, resuming, cost, training, looked_up).checked(backbone)


def load_config(
    path: str | Path | None,
    *,
    text: str | bytes | None = None,
    backbone: Backbone | str | None = None,
    overrides: Sequence[str] = (),
    memory: int | None = None,
    resuming: bool = False,
    training: bool = True,
    tasks: bool | None = None,
) -> LoadedConfig:
    """Read and check a config that is to be run. The arguments are those of `check_config`.

    If it is not for training (`training` false), findings about data, memory, disk and optimiser are left out, and
    house rules are not asked for.

    Raises:
        ConfigError: the config cannot be run. The message lists every finding with its place; `findings` holds them.
            If only the machine is at fault (a file that it names is missing, a plugin is broken), the error is a
            `ConfigEnvironmentError`.
        EnvironmentProblem: the file is missing or cannot be read.
        ValueError: neither `path` nor `text` is given.
    """
    checked = check_config(
        path,
        text=text,
        backbone=backbone,
        overrides=overrides,
        memory=memory,
        resuming=resuming,
        training=training,
        tasks=tasks,
    )
    if not training:
        kept = tuple(finding for finding in checked.findings if not finding.only_for_training)
        checked = replace(checked, findings=kept)
    errors = [finding for finding in checked.findings if finding.severity is Severity.ERROR]
    if errors:
        at_fault = all(blames_environment(finding) for finding in errors)
        kind = ConfigEnvironmentError if at_fault else ConfigError
        told = f"{render_text(checked.findings)}\n{printable(checked.source.file)}: {summary(checked.findings)}"
        raise kind(told, checked.findings)
    assert checked.config is not None
    assert checked.backbone is not None
    return LoadedConfig(checked.config, checked.backbone, checked.findings, checked.source)


# --- loading ---


class _Check:
    """The steps of checking one config, and the findings so far."""

    def __init__(
        self,
        source: Source,
        overrides: Sequence[str],
        memory: int | None,
        devices: int | None,
        resuming: bool,
        cost: bool,
        training: bool,
        tasks: bool,
    ) -> None:
        self.findings: list[Finding] = []
        self.memory = memory
        self.devices = devices
        self.resuming = resuming
        self.cost = cost
        self.training = training
        self.tasks = tasks
        self.source = source.with_overrides(overrides) if source.complete else source

    def checked(self, asked: Backbone | str | None) -> CheckedConfig:
        if not self.source.complete:
            return CheckedConfig(self._all(), self.source, None, None)
        data = dict(self.source.data)
        for section in _SECTIONS:
            if section in data and data[section] is None:  # its keys are all commented out
                data[section] = {}
        backbone = named_backbone(data, asked, self.source, self.findings)
        result = self._validate(data, backbone)
        if self.tasks and result.config is not None and result.config.eval.tasks:
            from ttt.check.tasks import resolve_tasks  # only configs with tasks need it

            resolve_tasks(result, self.source)
        if result.config is not None:
            result.config = found_again(result.config, Path(self.source.file))
        self.findings.extend(result.findings)
        as_meant = backbone is not None and not result.findings and not has_errors(self.source.findings)
        if result.config is not None:
            self._run_rules(result, backbone)
        return CheckedConfig(self._all(), self.source, result.config if as_meant else None, backbone)

    def _all(self) -> tuple[Finding, ...]:
        found = [placed(finding, self.source) for finding in (*self.source.findings, *self.findings)]
        return tuple(sorted(found, key=in_order))

    def _add(self, code: Code, path: str, message: str, fix: str, **more: Any) -> None:
        self.findings.append(code.at(path, message, fix, **more))

    # --- the schema ---

    def _validate(self, data: dict[str, Any], backbone: Backbone | None) -> Validated:
        if backbone is None:
            return self._validate_the_rest(data)
        try:
            with asked(backbone, "its options", backbone.options):
                model = run_config_model(backbone)
                ttt = data.get("ttt", {})
                if isinstance(ttt, Mapping):
                    data["ttt"] = with_defaults(with_its_target_eps(ttt), backbone.ttt_defaults)
                return validate(
                    model, data, self.source, other_options=functools.cache(lambda: _other_options(backbone))
                )
        except Exception as error:
            self._add_failed(backbone, error)
            return Validated(None)

    def _validate_the_rest(self, data: dict[str, Any]) -> Validated:
        """Validate the sections that do not depend on the backbone, if that is unknown."""
        result = validate(RunConfig, {**data, "backbone": {"name": "unknown"}, "data": {}}, self.source)
        # Whether the keys of `ttt` fit together depends on the plugin's defaults.
        result.findings = [finding for finding in result.findings if finding.code != TTT106.number]
        result.untrusted |= {("backbone",), ("data",), ("ttt",)}
        return result

    # --- the rules ---

    def _run_rules(self, result: Validated, backbone: Backbone | None) -> None:
        config, untrusted = result.config, result.untrusted
        assert config is not None
        untrusted |= {tuple(finding.path.split(".")) for finding in self.source.findings if finding.path}
        facts = None
        if backbone is not None and not any(_decides_facts(path, config) for path in untrusted):
            facts = self._of_a_possible_model(self._facts(backbone, config))
        context = Context(
            config,
            backbone,
            facts,
            lambda key: self.source.written(tuple(key.split("."))),
            self.memory,
            self.devices,
            resuming=self.resuming,
            tells_cost=self.cost,
            training=self.training,
            needed_files={} if backbone is None else self._files(backbone, config),
        )
        found = run_rules(context, untrusted)
        self._forget_what_follows(found)
        self.findings.extend(found)
        if backbone is not None:
            self._run_plugin_rules(backbone, map(as_rule, backbone.rules), config, untrusted)
            if self.training:
                self._run_house_rules(backbone, config, untrusted)

    def _facts(self, backbone: Backbone, config: RunConfig) -> BackboneFacts | None:
        try:
            return backbone.facts(config)
        except Exception as error:
            self._add_failed(backbone, error)
            return None

    def _files(self, backbone: Backbone, config: RunConfig) -> Mapping[str, NeededFile]:
        try:
            return backbone.files(config.backbone)
        except Exception as error:
            self._add_failed(backbone, error)
            return {}

    def _forget_what_follows(self, found: Sequence[Finding]) -> None:
        """Leave out what the facts' refusal of a file says if a rule has said what is wrong with that file."""
        blamed = {finding.path for finding in found if finding.severity is Severity.ERROR}
        self.findings = [each for each in self.findings if each.code != TTT605.number or each.path not in blamed]

    def _of_a_possible_model(self, facts: BackboneFacts | None) -> BackboneFacts | None:
        """The facts; None, with a finding, if the model is impossibly large."""
        found = None if facts is None else impossible_size(facts)
        if found is not None:
            self.findings.append(found)
        return facts if found is None else None

    def _run_plugin_rules(
        self,
        plugin: Backbone | Plugin,
        rules: Iterable[Rule[RunConfig]],
        config: RunConfig,
        untrusted: Set[KeyPath],
        *,
        path: str = "backbone.name",
    ) -> None:
        for rule in reliable(rules, untrusted):
            try:
                self.findings.extend(found_by(rule, plugin, config))
            except Exception as error:
                self._add_failed(plugin, error, path=path)

    def _run_house_rules(self, backbone: Backbone, config: RunConfig, untrusted: Set[KeyPath]) -> None:
        answers = house_rules(backbone.name)
        for failure in answers.failures:
            fix = REINSTALL if failure.broken else WAY_OUT
            self._add(TTT802 if failure.broken else TTT803, "", failure.told, fix, value=failure.plugin)
        for answer in answers.given:
            self._run_plugin_rules(answer.plugin, answer.value, config, untrusted, path="")

    def _add_failed(self, plugin: Backbone | Plugin, error: Exception, *, path: str = "backbone.name") -> None:
        """Add a finding about a plugin's error. It blames the plugin, or the user's key if the plugin refused it."""
        if isinstance(error, TTTError) and not isinstance(error, PluginError):
            self._add_refused(error)
            return
        told = error.told if isinstance(error, PluginError) else f"the plugin {plugin.name}: {in_one_line(error)}"
        self._add(TTT803, path, told, WAY_OUT, value=plugin.name)

    def _add_refused(self, error: TTTError) -> None:
        """Add a finding about a key, or a whole section, that a plugin refused."""
        path = error.key if error.key is not None and error.key.split(".")[0] in RunConfig.model_fields else "backbone"
        code = TTT605 if isinstance(error, EnvironmentProblem) else TTT106
        self._add(code, path, error.told, error.fix)


def _decides_facts(path: KeyPath, config: RunConfig) -> bool:
    """Whether a backbone's facts may depend on a key: on its options, but not on a key that it does not have."""
    sections: dict[str | int, BaseModel] = {"backbone": config.backbone, "data": config.data}
    section = sections.get(path[0])
    return section is not None and (len(path) == 1 or path[1] in type(section).model_fields)


def _other_options(backbone: Backbone) -> dict[str, list[type[BaseModel]]]:
    """The options of the other installed backbones, by name."""
    others = (plugin.backbone for plugin in plugins.discover() if plugin.name != backbone.name)
    return {other.name: [other.options, other.data_options] for other in others if other is not None}
