"""The verdict on every property of a model, with what the dtype forces as the tolerance.

Not every model has every property: with some options a decoder lacks one whatever its positions are, as a shift where
memory keys stay at position 0. So where one does not hold for a user's model, or cannot be measured, the same model
with plain rotary is asked as well, and where that lacks it too it is left out, with the reason. Ours are made so that
with plain rotary they have them all: there a failure is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .net import accepts
from .ours import Ours
from .properties import ALL, OF_ANY, Point, Property
from .subject import Subject


@dataclass(frozen=True)
class Result:
    """The verdict on one property; `deviation` is the largest of `points`, None where measuring raised `error`."""

    key: str
    name: str
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
    name: str
    reason: str


@torch.no_grad()
def check(
    subject: Subject, progress: Callable[[str], None] = lambda _line: None, prefix: str = ""
) -> tuple[tuple[Result, ...], tuple[LeftOut, ...]]:
    """Measure every property that the model can have; those that it cannot are named with the reason.

    One that raises is a failed result with its error, and the rest still run. `progress` is given a line before each,
    and `prefix` goes in front of their names.
    """
    planned, results, left_out = [], [], []
    for each in ALL if isinstance(subject, Ours) else OF_ANY:
        prop = replace(each, key=prefix + each.key, name=prefix + each.name)
        reason = prop.lacked(subject.net)
        if prop.needs is not None and not accepts(prop.needs):
            reason = f"this release of x-transformers lacks the argument {prop.needs}"
        if reason:
            left_out.append(LeftOut(prop.key, prop.name, reason))
        else:
            planned.append(prop)
    for number, prop in enumerate(planned, 1):
        progress(f"[{number}/{len(planned)}] {prop.name}")
        result = _judge(prop, subject)
        reason = "" if result.passed or isinstance(subject, Ours) else _reason_of_twin(prop, subject, result)
        if reason:
            left_out.append(LeftOut(prop.key, prop.name, reason))
        else:
            results.append(result)
    return tuple(results), tuple(left_out)


def _judge(prop: Property, subject: Subject, tolerance: float | None = None) -> Result:
    """The verdict on what is measured; what that raises is a failure with the error."""
    points: list[Point] = []
    try:
        options = prop.variant() if prop.variant is not None else {}
        subject = subject.variant(**options) if options and isinstance(subject, Ours) else subject
        tolerance = prop.tolerance(subject) if tolerance is None else tolerance
        points += prop.measure(subject)
    except Exception as raised:  # whatever a broken package raises is what there is to report
        error = " ".join(f"{type(raised).__name__}: {raised}".split())
        return Result(prop.key, prop.name, None, tolerance, error, tuple(points), error)
    worst = max(points, key=lambda point: point.deviation)
    detail = f"{min(point.length for point in points):,} to {max(point.length for point in points):,}"
    if worst.deviation > 0:
        kind = "worst" if math.isfinite(worst.deviation) else "not finite"
        detail += f"; {kind} at {worst.length:,}" + (f", {worst.note}" if worst.note else "")
    return Result(prop.key, prop.name, worst.deviation, tolerance, detail, tuple(points))


def _reason_of_twin(prop: Property, subject: Subject, result: Result) -> str:
    """Why it is no fault of xPos that the property does not hold, empty if it is one."""
    found = result.error
    # the tolerance is that of plain rotary
    if result.tolerance is not None:
        of_twin = _judge(prop, subject.plain, result.tolerance)
        if of_twin.passed:
            return ""
        found = of_twin.error or f"{of_twin.deviation:.1e} apart, {of_twin.detail}"
    return f"upstream does not have it with plain rotary and these options either: {found}"
