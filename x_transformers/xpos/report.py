"""Which package is being checked, and the outcome of the check as a table, as a JSON document and as a plot."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import x_transformers

from . import provenance
from .judge import LeftOut, Result
from .net import UsageError, is_patched

WIDTH = 100

Outcome = dict[str, Any]


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
        files = provenance.modified_files(path)
        modified += [f"not as they were built: {', '.join(files)}"] if files else []
    except provenance.FormatError as error:
        modified.append(str(error))
    if not is_patched():
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


def outcome(results: Sequence[Result], left_out: Sequence[LeftOut], run: Mapping[str, Any], **more: Any) -> Outcome:
    """What the check found, in plain values: the JSON document, of which the table and the plot are made.

    `run` says what was run: device, dtype, max_len, text, model, torch, seconds and the like. Of `more`, `logit_factor`
    is that of `Subject`, `tested` has lines on what of a user's model was tested, none for the check's own models, and
    `notes` is what else there is to say.
    """
    of_package = package()
    right = not of_package["unpatched"] + of_package["modified"]
    return {
        "format": 1,
        "passed": right and bool(results) and all(result.passed for result in results),
        "package": of_package,
        "run": run,
        "results": [{**asdict(result), "passed": result.passed} for result in results],
        "left_out": [asdict(each) for each in left_out],
        **more,
    }


# text


def table(found: Outcome) -> str:
    """Plain text, no line of its own wider than 100 columns (a path may be)."""
    run, results = found["run"], found["results"]
    lines = _package_lines(found["package"])
    lines += _wrapped("run       ", f"{run['dtype']} on {run['device']}, {run['model']}, torch {run['torch']}")
    lines += _wrapped("tested    ", *found["tested"])
    if not found["tested"]:
        lines += _wrapped("text      ", f"{run['max_len']:,} bytes of {run['text']}")
    lines += [*_wrapped("note      ", *found["notes"]), ""]

    width = max((len(result["name"]) for result in results), default=0)
    lines.append(f"{'property':<{width}}  deviation  tolerance  verdict  lengths")
    for result in results:
        row = f"{result['name']:<{width}}  {_number(result['deviation']):>9}  {_number(result['tolerance']):>9}  "
        row += f"{'pass' if result['passed'] else 'FAIL':<7}  "
        first, *rest = textwrap.wrap(result["detail"], WIDTH - len(row)) or [""]
        lines += [(row + first).rstrip(), *(" " * len(row) + more for more in rest)]

    names: dict[str, list[str]] = {}
    for each in found["left_out"]:
        names.setdefault(each["reason"], []).append(each["name"])
    lines += _wrapped("left out  ", *(f"{'; '.join(names[reason])}: {reason}" for reason in names))
    return "\n".join([*lines, "", *_wrapped("", *_explanations(found)), "", conclusion(found)])


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


def _explanations(found: Outcome) -> list[str]:
    dtype, factor = found["run"]["dtype"], found["logit_factor"]
    reason = "with xPos other keys weigh most"
    if factor != 4:
        reason = "nothing is wider than float64 to compute the angles in"
    forced = f"the error that {dtype} forces on the same model with plain rotary, run the same way"
    tolerance = f"Tolerance: {factor:,.0f} times {forced}: two runs are compared, and {reason}."
    scores = f"Of scores: a bound from the unit roundoff of {dtype}, relative to the terms of a query's largest score."
    return [tolerance] if found["tested"] else [tolerance, scores]


def conclusion(found: Outcome) -> str:
    failed, total = sum(not result["passed"] for result in found["results"]), len(found["results"])
    said = f"all {total} properties hold" if not failed else f"{failed} of {total} properties FAIL"
    if total == 0:
        said = "no property could be measured: FAIL"
    if found["package"]["unpatched"]:
        said += ", and the package is UNPATCHED: this is not the fork"
    elif found["package"]["modified"]:
        said += ", but the package is MODIFIED"
    return f"{said} ({found['run']['seconds']:.0f} s)"


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


def document(found: Outcome) -> str:
    """One JSON object. A deviation or tolerance that is no finite number is null, and `detail` says why."""
    return json.dumps(_finite(found), indent=2, allow_nan=False)


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
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            'argument --plot: needs matplotlib, which is not installed; pip install "x-transformers[plot]"'
        ) from None
    _save(Figure(), path)


def _save(figure: Any, path: str) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"argument --plot: cannot write {path}: {error}; give another path") from None


def plot(found: Outcome, path: str) -> None:
    """Write the deviation of each property against length, and the tolerances, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="length in positions")
    axes.set_ylabel("largest deviation (dashed: tolerance)")
    axes.set_title(f"{conclusion(found)}: {found['run']['dtype']} on {found['run']['device']}", fontsize=10)
    shown = [result for result in found["results"] if result["points"]]
    values = [value for each in shown for value in (each["tolerance"], *(p["deviation"] for p in each["points"]))]
    finite = [value for value in values if value and value < math.inf] or [1.0]
    floor, ceiling = min(finite) / 10, max(finite) * 10
    for result in shown:
        by_length = sorted((point["length"], point["deviation"]) for point in result["points"])
        # the last of a length is the largest
        worst = {length: max(floor, min(deviation, ceiling)) for length, deviation in by_length}
        label, marker = (result["name"], "o") if result["passed"] else (f"{result['name']}: FAIL", "X")
        (line,) = axes.plot([*worst], [*worst.values()], marker=marker, markersize=4, label=label)
        if result["tolerance"]:
            axes.hlines(result["tolerance"], min(worst), max(worst), line.get_color(), "dashed", linewidth=1)
    axes.set_ylim(floor / 2, ceiling * 2)
    legend = {"title": "lowest: 0\nhighest: not finite", "title_fontsize": 8, "fontsize": 8}
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), **legend)
    _save(figure, path)
