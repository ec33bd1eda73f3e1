"""The outcome of a check as a table, as a JSON document and as a plot."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .package import Package
from .properties import LeftOut, Result

WIDTH = 100

_FORMAT = 1


class PlotError(ValueError):
    """A plot that cannot be made; the message names the argument and the way out."""


@dataclass(frozen=True)
class Report:
    """`run` says what was run in plain values: device, dtype, max_len, text, torch, seconds and the like.

    `logit_factor` is that of `properties.Subject`: the tolerance of logits in units of the error that the dtype forces.
    `left_out` are the properties that were not measured. `tested` says what of a user's model was, one line each, and
    is empty for the check's own models; `notes` is what else there is to say.
    """

    package: Package
    run: Mapping[str, str | int | float]
    results: tuple[Result, ...]
    logit_factor: float
    left_out: tuple[LeftOut, ...] = ()
    tested: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if not result.passed)

    @property
    def passed(self) -> bool:
        return bool(self.results) and not self.failed and not self.package.problems


# text


def package_lines(package: Package) -> list[str]:
    record = package.record
    named = f"distribution x-transformers {package.distribution or 'not installed'}"
    if record is not None and package.distribution not in (None, record.version):
        named += ", not this copy"
    lines = [f"package   x_transformers from {package.path}", f"          {named}"]
    if record is None:
        lines.append("build     no record")
    else:
        count = len(record.patches)
        lines.append(
            f"build     {record.version} = {record.upstream_name} {record.upstream_version} and "
            f"{count} patch{'' if count == 1 else 'es'}, line {record.line}"
        )
        lines += [f"          {patch.name}" for patch in record.patches]
    if not package.problems:
        lines.append("          the files match this record")
    for kind, messages in (("UNPATCHED", package.unpatched), ("MODIFIED", package.modified)):
        lines += _wrapped(f"{kind:<10}", messages)
    return lines


def table(report: Report) -> str:
    """Plain text, no line of its own wider than 100 columns (a path may be)."""
    run = report.run
    lines = package_lines(report.package)
    lines += _wrapped("run       ", [f"{run['dtype']} on {run['device']}, {run['model']}, torch {run['torch']}"])
    if report.tested:
        lines += _wrapped("tested    ", report.tested)
        lines += _wrapped("note      ", report.notes)
    else:
        lines += _wrapped("text      ", [f"{run['max_len']:,} bytes of {run['text']}"])
    lines.append("")

    name_width = max((len(result.name) for result in report.results), default=0)
    head = f"{'property':<{name_width}}  deviation  tolerance  verdict"
    lines.append(f"{head}  lengths")
    for result in report.results:
        row = f"{result.name:<{name_width}}  {_number(result.deviation):>9}  {_number(result.tolerance):>9}  "
        row = f"{row}{result.verdict:<7}  "
        detail = textwrap.wrap(result.detail, WIDTH - len(row)) or [""]
        lines.append((row + detail[0]).rstrip())
        lines += [" " * len(row) + rest for rest in detail[1:]]
    if report.left_out:
        lines += _wrapped("left out  ", _left_out(report.left_out))
    lines.append("")

    lines += _wrapped("", _explanations(report))
    lines.append("")
    lines.append(conclusion(report))
    return "\n".join(lines)


def _left_out(left_out: tuple[LeftOut, ...]) -> list[str]:
    """One message for each reason."""
    of_reason: dict[str, list[str]] = {}
    for prop in left_out:
        named = f"{prop.name} ({prop.needs})" if prop.needs is not None else prop.name
        of_reason.setdefault(prop.reason, []).append(named)
    return [f"{'; '.join(names)}: {reason}" for reason, names in of_reason.items()]


def _explanations(report: Report) -> list[str]:
    dtype, factor = report.run["dtype"], f"{report.logit_factor:,.0f}"
    reason = "two runs are compared, and each rounds q and k once more"
    if report.logit_factor != 4:
        reason = "two runs are compared, and nothing is wider than float64 to compute the angles in"
    forced = f"the error that {dtype} forces on the same model without positions, run the same way"
    scores = f"a bound from the unit roundoff of {dtype}, relative to the terms of a query's largest score"
    if report.tested:
        forced = f"the error that {dtype} forces on the same model with plain rotary, run the same way"
        reason = reason.replace("each rounds q and k once more", "with xPos other keys weigh most")
        return [f"Tolerance: {factor} times {forced}: {reason}."]
    return [f"Tolerance of logits: {factor} times {forced}: {reason}.", f"Of scores: {scores}."]


def conclusion(report: Report) -> str:
    failed, total = len(report.failed), len(report.results)
    outcome = f"all {total} properties hold" if not failed else f"{failed} of {total} properties FAIL"
    if total == 0:
        outcome = "no property could be measured: FAIL"
    package = report.package
    if package.unpatched:
        outcome += ", and the package is UNPATCHED: this is not the fork"
    elif package.problems:
        outcome += ", but the package is MODIFIED"
    return f"{outcome} ({report.run['seconds']:.0f} s)"


def _number(value: float | None) -> str:
    if value is None:
        return "error"
    if not math.isfinite(value):
        return "inf/nan"
    return "0" if value == 0 else f"{value:.1e}"


def _wrapped(label: str, messages: list[str] | tuple[str, ...]) -> list[str]:
    lines = []
    for message in messages:
        lines += textwrap.wrap(
            message,
            WIDTH,
            initial_indent=label,
            subsequent_indent=" " * len(label),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


# JSON


def document(report: Report) -> str:
    """One JSON object. A deviation or tolerance that is no finite number is null, and `detail` says why."""
    package, record = report.package, report.package.record
    fields: dict[str, Any] = {
        "format": _FORMAT,
        "passed": report.passed,
        "package": {
            "path": str(package.path),
            "distribution": package.distribution,
            "version": record and record.version,
            "upstream": record and {"name": record.upstream_name, "version": record.upstream_version},
            "line": record and record.line,
            "patches": [patch.name for patch in record.patches] if record else [],
            "unpatched": list(package.unpatched),
            "modified": list(package.modified),
        },
        "run": dict(report.run),
        "logit_factor": report.logit_factor,
        "results": [
            {
                "key": result.key,
                "name": result.name,
                "deviation": _finite(result.deviation),
                "tolerance": _finite(result.tolerance),
                "passed": result.passed,
                "detail": result.detail,
                "error": result.error,
                "points": [
                    {"length": point.length, "deviation": _finite(point.deviation), "note": point.note}
                    for point in result.points
                ],
            }
            for result in report.results
        ],
        "left_out": [
            {"key": prop.key, "name": prop.name, "needs": prop.needs, "reason": prop.reason} for prop in report.left_out
        ],
        "tested": list(report.tested),
        "notes": list(report.notes),
    }
    return json.dumps(fields, indent=2, allow_nan=False)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# plot


def prepare_plot(path: str) -> None:
    """Refuse a plot that could not be written, before there is any work to lose. Raises PlotError."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise PlotError(
            'argument --plot: needs matplotlib, which is not installed; pip install "x-transformers[plot]"'
        ) from None
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix.lower().lstrip(".") not in kinds:
        raise PlotError(f"argument --plot: the name of {path} must end in one of .{', .'.join(kinds)}")
    existed = Path(path).exists()
    try:
        with Path(path).open("ab"):
            pass
    except OSError as error:
        raise PlotError(f"argument --plot: cannot write {path}: {error.strerror}; give a path that can be") from None
    if not existed:
        Path(path).unlink()


def plot(report: Report, path: str) -> None:
    """Write the deviation of each property against length, and the tolerances, both axes logarithmic.

    Raises PlotError if the file cannot be written after all.
    """
    from matplotlib.figure import Figure

    shown = [result for result in report.results if result.points]
    finite = [
        value
        for result in shown
        for value in [point.deviation for point in result.points] + [result.tolerance or 0.0]
        if 0 < value < math.inf
    ]
    floor, ceiling = (min(finite) / 10, max(finite) * 10) if finite else (1e-16, 1.0)

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    for result in shown:
        worst: dict[int, float] = {}
        for point in result.points:
            worst[point.length] = max(worst.get(point.length, 0.0), point.deviation)
        lengths = sorted(worst)
        values = [min(max(worst[length], floor), ceiling) for length in lengths]
        label = f"{result.name}{'' if result.passed else ': FAIL'}"
        (line,) = axes.plot(lengths, values, marker="o" if result.passed else "X", markersize=4, label=label)
        if result.tolerance:
            axes.plot(
                [lengths[0], lengths[-1]], [result.tolerance] * 2, linestyle="--", linewidth=1, color=line.get_color()
            )
    axes.set(xscale="log", yscale="log", ylim=(floor / 2, ceiling * 2))
    axes.set_xlabel("length in positions")
    axes.set_ylabel("largest deviation (dashed: tolerance)")
    axes.set_title(f"{conclusion(report)}: {report.run['dtype']} on {report.run['device']}", fontsize=10)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, title="lowest: 0\nhighest: not finite", title_fontsize=8
    )
    axes.grid(visible=True, alpha=0.3)
    try:
        figure.savefig(path)
    except OSError as error:
        raise PlotError(f"argument --plot: cannot write {path}: {error.strerror}; give a path that can be") from None
