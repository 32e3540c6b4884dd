"""Codes of what is found before any rule runs: about the keys, the backbone that is named, and its plugin."""

from __future__ import annotations

from functools import partial

from ttt.config.findings import Blame, Code, Family, Severity

REINSTALL = "reinstall it, or tell who made it"
"""What to do about a broken plugin."""

_code = partial(Code, severity=Severity.ERROR, home=__name__)
_schema = partial(_code, family=Family.SCHEMA)
TTT101 = _schema("TTT101", "unknown key")
TTT102 = _schema("TTT102", "wrong type")
TTT103 = _schema("TTT103", "a value that is not allowed")
TTT104 = _schema("TTT104", "a required key is missing")
TTT105 = _schema("TTT105", "a key in the wrong section")
TTT106 = _schema("TTT106", "keys that do not fit together")
TTT107 = _schema("TTT107", "an option of another backbone")
# Only for training: elsewhere the model is built at once, and that error says what the file was needed for.
TTT605 = _code(
    "TTT605",
    "a file of the backbone that cannot be read",
    family=Family.ENVIRONMENT,
    blames=Blame.MACHINE,
    of_training=True,
)
_plugins = partial(_code, family=Family.PLUGINS)
TTT801 = _plugins("TTT801", "unknown backbone")
TTT802 = _plugins("TTT802", "a broken plugin", blames=Blame.PLUGIN)
TTT803 = _plugins("TTT803", "a plugin that failed while it was asked", blames=Blame.PLUGIN)
