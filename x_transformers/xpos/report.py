"""The outcome of a check as a table, as a JSON document and as a plot."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .judge import LeftOut, Result
from .package import Package

WIDTH = 100

_FORMAT = 1


class PlotError(ValueError):
    """A plot that cannot be made; the message names the argument and the way out."""


@dataclass(frozen=True)
class Report:
    """`run` says what was run in plain values: device, dtype, max_len, text, torch, seconds and the like.

    `logit_factor` is that of `Subject`: the tolerance of outputs in units of the error that the dtype forces.
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


def table(report: Report) -> str:
    """Plain text, no line of its own wider than 100 columns (a path may be)."""
    run = report.run
    lines = _package_lines(report.package)
    lines += _wrapped("run       ", f"{run['dtype']} on {run['device']}, {run['model']}, torch {run['torch']}")
    if report.tested:
        lines += _wrapped("tested    ", *report.tested)
    else:
        lines += _wrapped("text      ", f"{run['max_len']:,} bytes of {run['text']}")
    lines += [*_wrapped("note      ", *report.notes), ""]

    name_width = max((len(result.name) for result in report.results), default=0)
    lines.append(f"{'property':<{name_width}}  deviation  tolerance  verdict  lengths")
    for result in report.results:
        row = f"{result.name:<{name_width}}  {_number(result.deviation):>9}  {_number(result.tolerance):>9}  "
        row = f"{row}{result.verdict:<7}  "
        first, *rest = textwrap.wrap(result.detail, WIDTH - len(row)) or [""]
        lines += [(row + first).rstrip(), *(" " * len(row) + more for more in rest)]

    names_of: dict[str, list[str]] = {}
    for prop in report.left_out:
        names_of.setdefault(prop.reason, []).append(f"{prop.name} ({prop.needs})" if prop.needs else prop.name)
    lines += _wrapped("left out  ", *(f"{'; '.join(names)}: {reason}" for reason, names in names_of.items()))
    return "\n".join([*lines, "", *_wrapped("", *_explanations(report)), "", conclusion(report)])


def _package_lines(package: Package) -> list[str]:
    record = package.record
    named = f"distribution x-transformers {package.distribution or 'not installed'}"
    if record is not None and package.distribution not in (None, record.version):
        named += ", not this copy"
    lines = [f"package   x_transformers from {package.path}", f"          {named}"]
    if record is None:
        lines.append("build     no record")
    else:
        count = len(record.patches)
        built_from = f"{record.upstream_name} {record.upstream_version}"
        patches = f"{count} patch{'' if count == 1 else 'es'}, line {record.line}"
        lines += [f"build     {record.version} = {built_from} and {patches}"]
        lines += [f"          {patch.name}" for patch in record.patches]
    if not package.problems:
        lines.append("          the files match this record")
    return lines + _wrapped("UNPATCHED ", *package.unpatched) + _wrapped("MODIFIED  ", *package.modified)


def _explanations(report: Report) -> list[str]:
    dtype = report.run["dtype"]
    reason = "two runs are compared, and with xPos other keys weigh most"
    if report.logit_factor != 4:
        reason = "two runs are compared, and nothing is wider than float64 to compute the angles in"
    forced = f"the error that {dtype} forces on the same model with plain rotary, run the same way"
    tolerance = f"Tolerance: {report.logit_factor:,.0f} times {forced}: {reason}."
    scores = f"Of scores: a bound from the unit roundoff of {dtype}, relative to the terms of a query's largest score."
    return [tolerance] if report.tested else [tolerance, scores]


def conclusion(report: Report) -> str:
    failed, total = len(report.failed), len(report.results)
    outcome = f"all {total} properties hold" if not failed else f"{failed} of {total} properties FAIL"
    if total == 0:
        outcome = "no property could be measured: FAIL"
    if report.package.unpatched:
        outcome += ", and the package is UNPATCHED: this is not the fork"
    elif report.package.modified:
        outcome += ", but the package is MODIFIED"
    return f"{outcome} ({report.run['seconds']:.0f} s)"


def _number(value: float | None) -> str:
    if value is None:
        return "error"
    if not math.isfinite(value):
        return "inf/nan"
    return "0" if value == 0 else f"{value:.1e}"


def _wrapped(label: str, *messages: str) -> list[str]:
    indent = " " * len(label)
    options: Any = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
    return [line for text in messages for line in textwrap.wrap(text, WIDTH, initial_indent=label, **options)]


# JSON


def document(report: Report) -> str:
    """One JSON object. A deviation or tolerance that is no finite number is null, and `detail` says why."""
    package, record = report.package, report.package.record
    fields = {
        "format": _FORMAT,
        "passed": report.passed,
        "package": {
            "path": str(package.path),
            "distribution": package.distribution,
            "version": record and record.version,
            "upstream": record and {"name": record.upstream_name, "version": record.upstream_version},
            "line": record and record.line,
            "patches": [patch.name for patch in record.patches] if record else [],
            "unpatched": package.unpatched,
            "modified": package.modified,
        },
        "run": report.run,
        "logit_factor": report.logit_factor,
        "results": [{**asdict(result), "passed": result.passed} for result in report.results],
        "left_out": [asdict(prop) for prop in report.left_out],
        "tested": report.tested,
        "notes": report.notes,
    }
    return json.dumps(_finite(fields), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with None for each number that is not finite."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    with _writing(path), Path(path).open("ab"):
        pass
    if not existed:
        Path(path).unlink()


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PlotError(f"argument --plot: cannot write {path}: {error.strerror}; give a path that can be") from None


def plot(report: Report, path: str) -> None:
    """Write the deviation of each property against length, and the tolerances, both axes logarithmic.

    Raises PlotError if the file cannot be written after all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    shown = [result for result in report.results if result.points]
    values = [value for each in shown for value in (each.tolerance or 0.0, *(point.deviation for point in each.points))]
    finite = [value for value in values if 0 < value < math.inf] or [1.0]
    floor, ceiling = min(finite) / 10, max(finite) * 10
    for result in shown:
        worst: dict[int, float] = {}
        for point in sorted(result.points, key=lambda point: point.length):
            worst[point.length] = max(worst.get(point.length, floor), min(point.deviation, ceiling))
        label = f"{result.name}{'' if result.passed else ': FAIL'}"
        marker = "o" if result.passed else "X"
        (line,) = axes.plot(list(worst), list(worst.values()), marker=marker, markersize=4, label=label)
        if result.tolerance:
            ends, color = [min(worst), max(worst)], line.get_color()
            axes.plot(ends, [result.tolerance] * 2, linestyle="--", linewidth=1, color=color)
    axes.set(xscale="log", yscale="log", ylim=(floor / 2, ceiling * 2))
    axes.set(xlabel="length in positions", ylabel="largest deviation (dashed: tolerance)")
    axes.set_title(f"{conclusion(report)}: {report.run['dtype']} on {report.run['device']}", fontsize=10)
    legend = {"title": "lowest: 0\nhighest: not finite", "title_fontsize": 8, "fontsize": 8}
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), **legend)
    axes.grid(visible=True, alpha=0.3)
    with _writing(path):
        figure.savefig(path)
