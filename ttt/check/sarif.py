"""Findings as SARIF 2.1.0, the format that code scanning reads.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/sarif-v2.1.0-errata01-os-complete.html
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ttt.check.codes import TTT101
from ttt.check.render import MOST_CHARACTERS, around, shown
from ttt.config.findings import Finding, Place
from ttt.printable import json_text

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def render_sarif(findings: Sequence[Finding], *, version: str, problems: Sequence[str] = ()) -> str:
    """Findings as a SARIF log of one run.

    Args:
        findings: in the order to be listed.
        version: the version of this program.
        problems: one sentence for each file that could not be checked.
    """
    findings = shown(findings)
    titles = {finding.code: finding.title for finding in findings}
    codes = sorted(titles)
    run = {
        "tool": {
            "driver": {"name": "ttt check", "version": version, "rules": [_rule(code, titles[code]) for code in codes]}
        },
        "columnKind": "unicodeCodePoints",
        "invocations": [
            {
                "executionSuccessful": not problems,
                "toolExecutionNotifications": [{"level": "error", "message": {"text": text}} for text in problems],
            }
        ],
        "results": [_result(finding, codes.index(finding.code)) for finding in findings],
    }
    return json_text({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


def _rule(code: str, title: str) -> dict[str, Any]:
    return {"id": code} | ({"shortDescription": {"text": title}} if title else {})


def _result(finding: Finding, rule_index: int) -> dict[str, Any]:
    place = finding.place or Place("")
    text = f"{finding.message}. Fix: {finding.fix}." if finding.fix else f"{finding.message}."
    location: dict[str, Any] = {}
    if place.line is not None:
        location["physicalLocation"] = {
            "artifactLocation": _artifact(place),
            "region": {**_region(place), **_snippet(place)},
        }
    elif place.file:
        text = f"{place}: {text}"
    if finding.path:
        location["logicalLocations"] = [{"fullyQualifiedName": finding.path, "kind": "property"}]
    identity = "\0".join((finding.code, place.file, finding.path))
    result = {
        "ruleId": finding.code,
        "ruleIndex": rule_index,
        "level": finding.severity.value,
        "message": {"text": text},
        "locations": [location] if location else [],
        "partialFingerprints": {
            "codeFileAndKey/v1": hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()[:32]
        },
        "properties": {"value": finding.value},
    }
    if finding.replacement is not None and _marks_what_is_replaced(finding, place):
        replaced = {"deletedRegion": _region(place), "insertedContent": {"text": finding.replacement}}
        change = {"artifactLocation": _artifact(place), "replacements": [replaced]}
        result["fixes"] = [{"description": {"text": finding.fix}, "artifactChanges": [change]}]
    return result


def _marks_what_is_replaced(finding: Finding, place: Place) -> bool:
    """Whether the place marks the text to be replaced. If a value is on another line, the place marks its key."""
    if place.line is None or place.column is None:
        return False
    marked = place.text[place.column - 1 : place.column - 1 + place.width].strip("\"'")
    is_key = marked == finding.path.rpartition(".")[2]
    return is_key == (finding.code == TTT101.number)


def _artifact(place: Place) -> dict[str, str]:
    path = Path(place.file)
    return {"uri": path.as_uri() if path.is_absolute() else quote(os.fsencode(path.as_posix()))}


def _snippet(place: Place) -> dict[str, Any]:
    text, _ = around(place, MOST_CHARACTERS)
    return {"snippet": {"text": text}} if text else {}


def _region(place: Place) -> dict[str, int]:
    region = {"startLine": place.line or 1}
    if place.column is not None:
        region |= {"startColumn": place.column, "endColumn": place.column + max(place.width, 1)}
    return region
