"""Which package is checked, and what the check found: as plain values, as a table and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import x_transformers

from .. import build_record
from ..release import is_patched
from .properties import Point

WIDTH = 100


@dataclass(frozen=True)
class Result:
    """The verdict on one property: `deviation` is the largest of `points`, None where measuring raised `error`."""

    key: str
    compared: str
    deviation: float | None
    tolerance: float | None
    detail: str
    points: tuple[Point, ...] = ()
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.deviation is not None and self.tolerance is not None and self.deviation <= self.tolerance


@dataclass(frozen=True)
class LeftOut:
    """A property that is not measured, and why."""

    key: str
    compared: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a check found; `str()` of it is a table.

    `run` says what was run, in which dtype and where; `checked` has a line for each model, and `notes` what else there
    is to say. `package` is what `package()` gives.
    """

    results: tuple[Result, ...]
    left_out: tuple[LeftOut, ...]
    run: Mapping[str, Any]
    package: Mapping[str, Any]
    checked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Result, ...]:
        """The properties that do not hold, or that could not be measured because of an error."""
        return tuple(result for result in self.results if not result.passed)

    @property
    def passed(self) -> bool:
        """Whether every property holds that was measured, in a package that is patched and as it was built."""
        wrong = self.package["unpatched"] + self.package["modified"]
        return bool(self.results) and not self.failures and not wrong

    @property
    def conclusion(self) -> str:
        """The outcome in one line."""
        failed, total = len(self.failures), len(self.results)
        said = f"{failed} of {total} properties FAIL" if failed else f"all {total} properties hold"
        said = said if total else "no property could be measured: FAIL"
        unpatched = "; the package is UNPATCHED: it is upstream's, not the fork" if self.package["unpatched"] else ""
        modified = "; the package is MODIFIED since it was built" if self.package["modified"] else ""
        return f"{said}{unpatched or modified} ({self.run['seconds']:.0f} s)"

    def __str__(self) -> str:
        """Plain text, no line of its own wider than 100 columns (a path may be)."""
        run, reasons = self.run, dict[str, list[str]]()
        lines = [*_package_lines(self.package)]
        lines += _wrapped("run       ", f"{run['dtype']} on {run['device']}, torch {run['torch']}")
        lines += [*_wrapped("checked   ", *self.checked), *_wrapped("note      ", *self.notes)]
        lines += ["", "verdict  deviation  tolerance  what must be the same"]
        for result in self.results:
            verdict, numbers = "pass" if result.passed else "FAIL", (result.deviation, result.tolerance)
            row = "".join(f"{_number(value):>9}  " for value in numbers)
            lines.append(f"{verdict:<7}  {row}{result.key}: {result.compared}")
            lines += [] if result.passed else _wrapped(" " * 31, result.detail)
        for each in self.left_out:
            reasons.setdefault(each.reason, []).append(each.key)
        lines += _wrapped("left out  ", *(f"{', '.join(keys)}: {reason}" for reason, keys in reasons.items()))
        times = f"{run['factor']:,.0f} times the {run['dtype']} error"
        tolerance = f"Tolerance: {times} of the same model with plain rotary. "
        if any(result.key.startswith("scores") for result in self.results):
            tolerance += "Of scores: what the rounding of their dtype forces on them."
        return "\n".join([*lines, "", *_wrapped("", tolerance), "", self.conclusion])

    def to_json(self) -> str:
        """One JSON object. A deviation or tolerance that is no finite number is null, and `detail` says why."""
        results = [{**asdict(result), "passed": result.passed} for result in self.results]
        fields = json.dumps({"format": 2, "passed": self.passed, **asdict(self), "results": results})
        return json.dumps(json.loads(fields, parse_constant=lambda _: None), indent=2)


def package() -> dict[str, Any]:
    """What `import x_transformers` gives here, in plain values.

    `version`, `upstream`, `line` and `patches` are those of the record of the build, None or empty without one.
    `unpatched` and `modified` hold one message for each thing that is wrong.
    """
    path = Path(x_transformers.__file__).parent
    record, modified = None, list[str]()
    try:
        record = build_record.read_record(path)
        files = build_record.modified_files(path)
        modified += [f"these files are not as they were built: {', '.join(files)}"] if files else []
    except build_record.FormatError as error:
        modified.append(str(error))
    return {
        "path": str(path),
        "version": record and record.version,
        "upstream": record and f"{record.upstream_name} {record.upstream_version}",
        "line": record and record.line,
        "patches": [patch.name for patch in record.patches] if record else [],
        "unpatched": [] if is_patched() else ["RotaryEmbedding.forward takes no seq_len"],
        "modified": modified,
    }


def _package_lines(package: Mapping[str, Any]) -> list[str]:
    build = "unknown build: the package has no record of it, so its files cannot be compared"
    if package["version"]:
        build = f"{package['version']} = {package['upstream']} and the patches of line {package['line']}"
    lines = [f"package   x_transformers from {package['path']}", f"build     {build}"]
    lines += [f"          {name}" for name in package["patches"]]
    if package["version"] and not package["modified"]:
        lines.append("          the files are as they were built")
    return lines + _wrapped("UNPATCHED ", *package["unpatched"]) + _wrapped("MODIFIED  ", *package["modified"])


def _number(value: float | None) -> str:
    return "error" if value is None else f"{value:.1e}" if value else "0"


def _wrapped(label: str, *messages: str) -> list[str]:
    indent = " " * len(label)
    options: Any = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
    return [line for text in messages for line in textwrap.wrap(text, WIDTH, initial_indent=label, **options)]
