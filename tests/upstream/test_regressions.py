"""That each test marked `regression` fails on the unpatched release, and passes on the fixes alone.

And that it is noticed if a patch is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from outcomes import run
from trees import BACKPORT, LINE, ROOT, built_tree, hatch_build, pristine_tree, tree_up_to

# What a failure says, by the reason in the mark. A TypeError, a missing name or a shape that does not fit would make a
# test fail as well, but would not show what is wrong with the answers.
_APART = r"\w+: \S+ apart"
_ARGUMENT = r"unexpected keyword argument '(rotary_window|seq_len)'"
REASONS = {
    "differs": rf"(AssertionError: )?(Tensor-likes are not close|Scalars are not close|assert |([^:]*: )?{_APART})",
    "not refused": r"Failed: DID NOT RAISE|AssertionError: (\S+: not refused with xPos|assert 'broken' == 'refused')",
    # the last begins with the model itself, which takes `cache` twice
    "no argument": rf"(AssertionError: .*: )?TypeError: (\S+ got an {_ARGUMENT}|TransformerWrapper\($)",
}


def test_every_regression_test_fails_on_the_unpatched_release(tmp_path: Path, subtests: pytest.Subtests) -> None:
    files = [path for path in (ROOT / "tests" / "xpos").glob("test_*.py") if b"mark.regression" in path.read_bytes()]
    outcomes = run(tmp_path, "--pristine", "-m", "regression and not slow", *map(str, files))

    assert len(outcomes) > 60
    for name, reason, failure in outcomes:
        with subtests.test(name):
            assert failure is not None, "passes on the unpatched release, so it proves nothing"
            assert re.match(REASONS[reason], failure), f"not {reason!r}: {failure}"


@pytest.mark.slow
def test_the_properties_and_the_regressions_hold_with_range_and_digits_and_without_speed(tmp_path: Path) -> None:
    about = [f"tests/xpos/test_{name}.py" for name in ("properties", "scores", "features")]
    # what these parts lack is the complex factors of the one about speed, and modules that upstream pickled
    only = (f"--package={tree_up_to('B')}", "-m", "not slow", "-k", "not factors and not pickled")
    outcomes = run(tmp_path, *only, *about, HYPOTHESIS_PROFILE="quick")

    assert len([outcome for outcome in outcomes if outcome.reason]) > 30
    assert [outcome for outcome in outcomes if outcome.failure is not None] == []


# patches without which the others apply, and a test that fails then
WRAPPERS = "tests/xpos/test_wrappers.py::test_"
NEEDED_BY = {
    (LINE, "0003"): "tests/xpos/test_scores.py::test_scores_of_a_model_equal_the_formula",
    (LINE, "0007"): WRAPPERS + "recirculation_in_half_precision_is_right_and_not_limited_by_what_is_in_the_cache",
    (LINE, "0012"): "tests/xpos/test_cache.py::test_generate_continues_from_a_cache",
    (LINE, "0013"): "tests/xpos/test_prefill.py::test_what_one_call_has_no_range_for",
    (LINE, "0014"): "tests/xpos/test_scores.py::test_a_table_of_a_module_that_upstream_pickled",
    (
        BACKPORT,
        "0003",
    ): "tests/xpos/line_1_27/test_xpos.py::test_as_many_queries_as_the_dtype_can_represent_and_no_more",
}
PATCHES = [(line, name[:4]) for line in (LINE, BACKPORT) for name in hatch_build.read_series(ROOT / line)]


@pytest.mark.parametrize(("line", "number"), [patch for patch in PATCHES if patch not in NEEDED_BY])
def test_the_build_says_which_hunk_needs_a_patch_that_is_left_out(line: Path, number: str) -> None:
    package = pristine_tree(line) / "x_transformers"
    files = {f"x_transformers/{path.name}": path.read_bytes() for path in package.glob("*.py")}
    patches = [patch for patch in hatch_build.read_patches(ROOT / line) if not patch.name.startswith(number)]
    with pytest.raises(hatch_build.PatchError, match=r"(?s)^\S+\.patch (does not apply|applies) .*[Hh]unk #?\d+"):
        hatch_build.apply_series(files, patches)


@pytest.mark.slow
@pytest.mark.parametrize(("line", "number"), NEEDED_BY)
def test_a_test_fails_without_a_patch_that_is_left_out(line: Path, number: str, tmp_path: Path) -> None:
    tree = built_tree(line, [name for name in hatch_build.read_series(ROOT / line) if name[:4] != number])
    outcomes = run(tmp_path, f"--package={tree}", NEEDED_BY[line, number], HYPOTHESIS_PROFILE="quick")
    assert [outcome for outcome in outcomes if outcome.failure is not None]
