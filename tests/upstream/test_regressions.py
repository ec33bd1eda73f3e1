"""That each test marked `regression` fails on the unpatched release, and passes on the fixes alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from outcomes import run
from trees import BACKPORT, LINE, ROOT, pristine_tree, tree_up_to

from patches.try_release import PROPERTIES

# What a failure says, by the reason in the mark. A TypeError, a missing name or a shape that does not fit would make a
# test fail as well, but would not show what is wrong with the answers.
_APART = r"[\w-]+: \S+ apart"
_ARGUMENT = r"unexpected keyword argument '(rotary_window|seq_len)'"
REASONS = {
    "differs": rf"(AssertionError: )?(Tensor-likes are not close|Scalars are not close|assert |([^:]*: )?{_APART})",
    "not refused": r"Failed: DID NOT RAISE|AssertionError: (\S+: not refused with xPos|assert 'broken' == 'refused')",
    # the last begins with the model itself, which takes `cache` twice
    "no argument": rf"(AssertionError: .*: )?TypeError: (\S+ got an {_ARGUMENT}|TransformerWrapper\($)",
}


# of the older release nothing else can be wrong until this is out of the way
OLDER = ".*NameError: name 'seq_len' is not defined"


@pytest.mark.parametrize(("line", "folder"), [(LINE, "xpos"), (BACKPORT, "xpos/every_line")])
def test_every_regression_test_fails_on_the_unpatched_release(
    line: Path, folder: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    # the others would take time to import
    files = [path for path in (ROOT / "tests" / folder).rglob("test_*.py") if b"mark.regression" in path.read_bytes()]
    package = "--pristine" if line == LINE else f"--package={pristine_tree(line)}"
    outcomes = run(tmp_path, package, "-m", "regression and not slow", *map(str, files), HYPOTHESIS_PROFILE="pristine")

    assert len(outcomes) > 25
    for name, reason, failure in outcomes:
        with subtests.test(name):
            assert failure is not None, "passes on the unpatched release, so it proves nothing"
            assert re.match(REASONS[reason] if line == LINE else OLDER, failure), f"not {reason!r}: {failure}"


@pytest.mark.slow
def test_the_properties_and_the_regressions_hold_with_range_and_digits_and_without_speed(tmp_path: Path) -> None:
    # what these parts lack is the complex factors of the one about speed, and modules that upstream pickled
    only = (f"--package={tree_up_to('B')}", "-m", "not slow", "-k", "not factors and not what_is_saved")
    outcomes = run(tmp_path, *only, *PROPERTIES, HYPOTHESIS_PROFILE="quick")

    assert len([outcome for outcome in outcomes if outcome.reason]) > 30
    assert [outcome for outcome in outcomes if outcome.failure is not None] == []
