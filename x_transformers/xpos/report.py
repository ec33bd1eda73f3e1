"""Which package is being checked, and the outcome of the check as a table, as a JSON document and as a plot."""

from __future__ import annotations

import inspect
import json
import math
import os
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import x_transformers
from x_transformers.x_transformers import RotaryEmbedding

from . import provenance
from .judge import LeftOut, Result
from .net import UsageError

WIDTH = 100


def package() -> dict[str, Any]:
    """What `import x_transformers` gives here, in plain values.

    `distribution` is the version that the environment's metadata gives; `version`, `upstream`, `line` and `patches` are
    those of the record of the build. `unpatched` and `modified` hold one message for each thing that is wrong.
    """
    path = Path(x_transformers.__file__).parent
    distribution, record, unpatched, modified = None, None, [], []
    with suppress(metadata.PackageNotFoundError):
        distribution = metadata.version("x-transformers")
    try:
        record = provenance.read_record(path)
        if record is None or not record.patches:
            unpatched.append("there is no record of patches")
        files = provenance.modified_files(path, record)
        modified += [f"not as they were built: {', '.join(files)}"] if files else []
    except provenance.FormatError as error:
        modified.append(str(error))
    if "seq_len" not in inspect.signature(RotaryEmbedding.forward).parameters:
        unpatched.append("RotaryEmbedding.forward takes no seq_len")
    return {
        "path": str(path),
        "distribution": distribution,
        "version": record and record.version,
        "upstream": record and {"name": record.upstream_name, "version": record.upstream_version},
        "line": record and record.line,
        "patches": [patch.name for patch in record.patches] if record else [],
        "unpatched": unpatched,
        "modified": modified,
    }


@dataclass(frozen=True)
class Report:
    """`run` says what was run in plain values: device, dtype, max_len, text, torch, seconds and the like.

    `logit_factor` is that of `Subject`: the tolerance of outputs in units of the error that the dtype forces.
    `left_out` are the properties that were not measured. `tested` says what of a user's model was, one line each, and
    is empty for the check's own models; `notes` is what else there is to say.
    """

    package: Mapping[str, Any]
    run: Mapping[str, str | int | float]
    results: tuple[Result, ...]
    logit_factor: float
    left_out: tuple[LeftOut, ...] = ()
    tested: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        right = not self.package["unpatched"] + self.package["modified"]
        return right and bool(self.results) and all(result.passed for result in self.results)


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
        row = f"{row}{'pass' if result.passed else 'FAIL':<7}  "
        first, *rest = textwrap.wrap(result.detail, WIDTH - len(row)) or [""]
        lines += [(row + first).rstrip(), *(" " * len(row) + more for more in rest)]

    names_of: dict[str, list[str]] = {}
    for prop in report.left_out:
        names_of.setdefault(prop.reason, []).append(f"{prop.name} ({prop.needs})" if prop.needs else prop.name)
    lines += _wrapped("left out  ", *(f"{'; '.join(names)}: {reason}" for reason, names in names_of.items()))
    return "\n".join([*lines, "", *_wrapped("", *_explanations(report)), "", conclusion(report)])


def _package_lines(package: Mapping[str, Any]) -> list[str]:
    distribution, version, patches = package["distribution"], package["version"], package["patches"]
    other = ", not this copy" if version and distribution and version != distribution else ""
    lines = [
        f"package   x_transformers from {package['path']}",
        f"          distribution x-transformers {distribution or 'not installed'}{other}",
        "build     no record",
    ]
    if version:
        count = f"{len(patches)} patch{'' if len(patches) == 1 else 'es'}"
        upstream = " ".join(package["upstream"].values())
        lines[-1] = f"build     {version} = {upstream} and {count}, line {package['line']}"
    lines += [f"          {name}" for name in patches]
    if not package["unpatched"] + package["modified"]:
        lines.append("          the files match this record")
    return lines + _wrapped("UNPATCHED ", *package["unpatched"]) + _wrapped("MODIFIED  ", *package["modified"])


def _explanations(report: Report) -> list[str]:
    dtype = report.run["dtype"]
    reason = "with xPos other keys weigh most"
    if report.logit_factor != 4:
        reason = "nothing is wider than float64 to compute the angles in"
    forced = f"the error that {dtype} forces on the same model with plain rotary, run the same way"
    tolerance = f"Tolerance: {report.logit_factor:,.0f} times {forced}: two runs are compared, and {reason}."
    scores = f"Of scores: a bound from the unit roundoff of {dtype}, relative to the terms of a query's largest score."
    return [tolerance] if report.tested else [tolerance, scores]


def conclusion(report: Report) -> str:
    failed, total = sum(not result.passed for result in report.results), len(report.results)
    outcome = f"all {total} properties hold" if not failed else f"{failed} of {total} properties FAIL"
    if total == 0:
        outcome = "no property could be measured: FAIL"
    if report.package["unpatched"]:
        outcome += ", and the package is UNPATCHED: this is not the fork"
    elif report.package["modified"]:
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
    results = [{**asdict(result), "passed": result.passed} for result in report.results]
    fields = {"format": 1, "passed": report.passed, **asdict(report), "results": results}
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
    """Refuse, with UsageError, a plot that could not be written, before there is any work to lose."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UsageError(
            'argument --plot: needs matplotlib, which is not installed; pip install "x-transformers[plot]"'
        ) from None
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix.lower().lstrip(".") not in kinds:
        raise UsageError(f"argument --plot: the name of {path} must end in one of .{', .'.join(kinds)}")
    if not os.access(path if Path(path).exists() else Path(path).parent, os.W_OK):
        raise _unwritable(path)


def _unwritable(path: str) -> UsageError:
    return UsageError(f"argument --plot: cannot write {path}; give a path that can be written")


def plot(report: Report, path: str) -> None:
    """Write the deviation of each property against length, and the tolerances, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="length in positions")
    axes.set_ylabel("largest deviation (dashed: tolerance)")
    axes.set_title(f"{conclusion(report)}: {report.run['dtype']} on {report.run['device']}", fontsize=10)
    values = [value for each in report.results for value in (each.tolerance or 0.0, *each.worst.values())]
    finite = [value for value in values if 0 < value < math.inf] or [1.0]
    floor, ceiling = min(finite) / 10, max(finite) * 10
    for result in (result for result in report.results if result.worst):
        lengths, shown = [*result.worst], [max(floor, min(value, ceiling)) for value in result.worst.values()]
        label, marker = (result.name, "o") if result.passed else (f"{result.name}: FAIL", "X")
        (line,) = axes.plot(lengths, shown, marker=marker, markersize=4, label=label)
        if result.tolerance:
            axes.hlines(result.tolerance, lengths[0], lengths[-1], line.get_color(), "dashed", linewidth=1)
    axes.set_ylim(floor / 2, ceiling * 2)
    legend = {"title": "lowest: 0\nhighest: not finite", "title_fontsize": 8, "fontsize": 8}
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), **legend)
    try:
        figure.savefig(path)
    except OSError:
        raise _unwritable(path) from None
