"""The checker: what `x_transformers.xpos.check` and the command line run.

The modules, each of which imports only those after it: report, properties, samples, runs, models, formula.

Not every model has every property: with some options a decoder lacks one whatever its positions are, as a shift where
memory keys stay at position 0. So where one does not hold for a user's model, or cannot be measured, the same model
with plain rotary is asked as well, and where that lacks it too it is left out, with the reason. The check's own models
have them all with plain rotary: there a failure is one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..limits import DTYPES
from ..release import accepts
from . import properties, samples
from .models import SEED, find, name_of, said, summary, usable_copy
from .properties import Point, Property
from .report import LeftOut, Report, Result, package
from .runs import ROWS, Case

OWN_MODELS = object()
MAX_LEN, MAX_LEN_OF_MODEL = 1_024, 512


@torch.no_grad()
def check_model(
    module: object,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_len: int | None = None,
    progress: bool = False,
) -> Report:
    """What `check` documents, for a module or for `OWN_MODELS`."""
    started, is_sample = time.monotonic(), module is OWN_MODELS
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"dtype is {dtype}: give torch.{', torch.'.join(DTYPES)}, or leave it out")
    checked, notes, cases = list[str](), list[str](), dict[str, Case]()
    # the random state of torch is left as it was; nothing here draws from any other
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    with torch.random.fork_rng(devices=devices):
        for path, found in find(samples.build().module if is_sample else module).items():
            model, note = usable_copy(found, dtype, device, must_run=not is_sample)
            length = model.length_to_read(max_len, MAX_LEN if is_sample else MAX_LEN_OF_MODEL)
            cases[path or type(found.module).__name__] = Case(model, model.text(ROWS, length))
            reads = "token ids" if model.reads_tokens else "hidden states"
            checked.append(f"{summary(path, model)}; {length:,} random {reads}")
            notes += [note] if note else []
        verdicts: list[Result | LeftOut] = []
        for name, case in cases.items():
            prefix = f"{name}: " if len(cases) > 1 else ""
            verdicts += _verdicts(case, is_sample, prefix, progress)
            if not case.positions_matter():
                says_little = "the output is the same without positions, so the check can say little about them"
                notes.append(f"{prefix}{says_little}. Are these the weights after training?")
    results = tuple(each for each in verdicts if isinstance(each, Result))
    left_out = tuple(each for each in verdicts if isinstance(each, LeftOut))
    run = {
        "device": str(model.device),
        "dtype": name_of(model.dtype),
        "max_len": max(case.max_len for case in cases.values()),
        "factor": max(case.factor for case in cases.values()),
        "seed": SEED,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started, 1),
    }
    return Report(results, left_out, run, package(), tuple(checked), tuple(notes))


def _verdicts(case: Case, is_sample: bool, prefix: str, progress: bool) -> Iterator[Result | LeftOut]:
    """The verdict on every property that the model can have, and the reason where it cannot."""
    chosen = [replace(each, key=prefix + each.key) for each in properties.ALL if is_sample or each.variant is None]
    for number, prop in enumerate(chosen, 1):
        reason = getattr(case.model, prop.lacked) if prop.lacked else ""
        if prop.needs and not accepts(prop.needs):
            reason = f"this release of x-transformers lacks the argument {prop.needs}"
        if progress:
            print(f"[{number}/{len(chosen)}] {prop.key}: {'left out' if reason else prop.compared}", file=sys.stderr)
        if not reason:
            result = _measured(prop, case)
            reason = "" if result.passed or is_sample else _lacked_by_plain_rotary(prop, case, result)
        yield LeftOut(prop.key, prop.compared, reason) if reason else result


def _measured(prop: Property, case: Case, tolerance: float | None = None) -> Result:
    """The verdict on what is measured; what that raises is a failure with the error."""
    points: list[Point] = []
    try:
        case = samples.variant(case, **prop.variant) if prop.variant else case
        of = prop.tolerance
        tolerance = tolerance if tolerance is not None else case.tolerance(of) if isinstance(of, str) else of(case)
        points += prop.measure(case)
    except Exception as raised:  # whatever a broken package raises is what there is to report
        error = said(raised)
        return Result(prop.key, prop.compared, None, tolerance, error, tuple(points), error)
    worst = max(points, key=lambda point: point.deviation)
    detail = f"the worst of {len(points)}, at {worst.length:,} positions" + (f", {worst.note}" if worst.note else "")
    return Result(prop.key, prop.compared, worst.deviation, tolerance, detail, tuple(points))


def _lacked_by_plain_rotary(prop: Property, case: Case, result: Result) -> str:
    """Why it is no fault of xPos that the property does not hold, empty if it is one."""
    found = result.error
    # the tolerance is that of plain rotary
    if result.tolerance is not None:
        of_plain = _measured(prop, case.plain, tolerance=result.tolerance)
        if of_plain.passed:
            return ""
        found = of_plain.error or f"{of_plain.deviation:.1e} apart, {of_plain.detail}"
    return f"the same model with plain rotary does not have it either: {found}"
