"""`ttt check --probe`: prove the laws on the config's own backbone, made so small that it takes seconds.

Width and depth are those of the plugin's `tiny()`. Everything else that could break a law is the config's: every
setting of the `ttt` section, the mini-batch, the group, the nesting of checkpoints, the dtype of the parameters.
"""

from __future__ import annotations

import time
import traceback

import torch
from rich.console import Console

from ttt.check.codes import TTT803
from ttt.check.probe.proofs import Proof, cuts, proofs
from ttt.check.probe.setting import Setting, place_layers, small_setting
from ttt.check.probe_codes import LAWS
from ttt.config.explanation import read_explanations
from ttt.config.findings import Finding
from ttt.config.schema import RunConfig
from ttt.errors import PluginError, TTTError
from ttt.laws import LawBrokenError
from ttt.plugins import Backbone
from ttt.plugins.asking import owner
from ttt.printable import say
from ttt.train.setup import threads, with_backbone_options
from ttt.words import first_line


def probe(config: RunConfig, backbone: Backbone, *, console: Console | None = None) -> list[Finding]:
    """Prove the laws for a config on a small model on the CPU, and print each law with the measured number.

    It tries laws 1 to 6 and 10: a pass writes nothing and a second pass gives the same; recomputing changes no
    gradient; no token changes an earlier output; a stream in pieces gives the same as the whole sequence; rows are
    independent; with closed gates the model is the plain backbone; every TTT layer is reached, moves and gets
    gradients.

    Args:
        config: what `ttt.check.load_config` returned, without errors.
        backbone: its plugin.
        console: where to print; None is standard output.

    Returns:
        A finding for each broken law, `TTT901` … `TTT910` by the law's number, and `TTT803` if the plugin failed while
        a law was tried. They have no place; the path is the key to blame.

    Raises:
        ttt.errors.TTTError: the model cannot be built, or TTT cannot be injected with these settings.
    """
    console = console or Console()
    config = with_backbone_options(config, backbone)
    started = time.monotonic()
    findings: list[Finding] = []
    # One thread: the matrices are small, and several threads would only wait for each other.
    with threads(1), torch.random.fork_rng(devices=[]):
        setting = small_setting(config, backbone)
        say(console, f"probe: {setting.told[0]}")
        for line in setting.told[1:]:
            say(console, f"  {line}")
        if not setting.layers:
            say(console, "  ttt.layers names no layer: there is nothing to prove")
            return []
        for proof in proofs(setting):
            if proof.compares_passes and any(finding.declared is LAWS[1] for finding in findings):
                _row(console, proof, "--", "two passes cannot be compared")
                continue
            findings += _try(proof, setting, console)
    broken = len({finding.code for finding in findings})
    verdict = f"{broken} {'law' if broken == 1 else 'laws'} broken" if broken else "every law holds"
    say(console, f"probe: {verdict}, {time.monotonic() - started:.1f} s")
    return findings


def _try(proof: Proof, setting: Setting, console: Console) -> list[Finding]:
    """Try one law, print the result, and return the findings."""
    if proof.applies:
        _row(console, proof, "--", proof.applies)
        return []
    try:
        measured = proof.run()
    except LawBrokenError as broken:
        _row(console, proof, "BROKEN", "" if broken.measured is None else f"{broken.measured:.1e}")
        return [_finding(broken, setting.bench.backbone)]
    except PluginError as error:
        _row(console, proof, "FAILED", type(error.__cause__ or error).__name__)
        return [_failed(error.told, proof)]
    except TTTError:
        raise
    except Exception as error:  # a plugin's code may raise anything; the finding blames the plugin
        _row(console, proof, "FAILED", type(error).__name__)
        return [_failure(error, proof, setting.bench.backbone)]
    if proof.law == 10:
        _row(console, proof, "ok", f"{min(measured.values()):.1e}")
    else:
        worst = max(measured.values(), default=0.0)
        _row(console, proof, "ok", f"{worst:.1e}" if worst else "0")
    return []


def _finding(broken: LawBrokenError, backbone: Backbone) -> Finding:
    code = LAWS[broken.law]
    explained = read_explanations(LAWS.values())[code.number]
    return code.at(
        "backbone.name",
        message=f"{backbone.name} breaks law {broken.law}: {broken.what}",
        fix=f"In the plugin {backbone.name}: {explained.fix}",
        value=broken.measured,
    )


def _failure(error: Exception, proof: Proof, backbone: Backbone) -> Finding:
    where = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {first_line(error, otherwise='')}"
    return _failed(f"{owner(backbone)} failed, {where.filename}:{where.lineno}: {what}", proof)


def _failed(what: str, proof: Proof) -> Finding:
    return TTT803.at(
        "backbone.name",
        message=f"law {proof.law} ({proof.claim}): {what}",
        fix="ttt.testing.laws runs the same in pytest",
    )


def _row(console: Console, proof: Proof, verdict: str, number: str) -> None:
    limit = f" ≤{proof.tolerance:.0e}" if proof.tolerance is not None and verdict in ("ok", "BROKEN") else ""
    say(console, f"  law {proof.law:<2}  {verdict:<6}  {proof.claim:<36}  {number}{limit} {proof.kind}".rstrip())


__all__ = ["cuts", "place_layers", "probe", "small_setting"]
