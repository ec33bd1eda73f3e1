from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from trees import LINE, copy_project, patched_tree, pristine_tree, provenance

# asserts in the helpers say what they compared, too; but those in `trees` give the build's own message
pytest.register_assert_rewrite(*{path.stem for path in Path(__file__).with_name("helpers").glob("*.py")} - {"trees"})

# the models of the tests are so small that more threads would only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Building a model takes longer than Hypothesis expects of an input, and varies with the machine. Every run draws new
# examples, under CI too, where Hypothesis's own profile, which these start from, would not.
slow_inputs = [HealthCheck.too_slow, HealthCheck.data_too_large]
common: dict[str, Any] = dict(deadline=None, suppress_health_check=slow_inputs, print_blob=True, derandomize=False)
settings.register_profile("default", max_examples=60, **common)

# Where tests may be meant to fail the first failure is enough: nothing to shrink, to replay or to explain. The examples
# are the same every time: what must fail may not depend on luck.
phases = [Phase.explicit, Phase.generate]
common.update(print_blob=False, derandomize=True, phases=phases, database=None, report_multiple_bugs=False)
settings.register_profile("quick", max_examples=10, **common)
settings.register_profile("pristine", max_examples=60, **common)

# the line of the package that is tested
LINE_TESTED = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("x-transformers", "which x_transformers is tested")
    group.addoption("--pristine", action="store_true", help="the unpatched pinned release, built with an empty series")
    group.addoption("--upstream", type=Path, metavar="DIR", help="a clone of upstream's repository, to run its tests")
    group.addoption("--package", type=Path, metavar="DIR", help="the one in DIR, not what the checkout gives now")


def pytest_configure(config: pytest.Config) -> None:
    """Import the package from a tree that the checkout gives as it is now, whatever is installed."""
    pristine = config.getoption("pristine")
    try:
        tree = (config.getoption("package") or (pristine_tree() if pristine else patched_tree())).absolute()
    except AssertionError as error:  # the build's own message
        raise pytest.UsageError(str(error)) from None
    if not (tree / "x_transformers" / "__init__.py").is_file():
        raise pytest.UsageError(f"--package {tree}: there is no x_transformers in it")
    sys.path.insert(0, str(tree))
    # for what tests start
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    record = provenance.read_record(tree / "x_transformers")
    config.stash[LINE_TESTED] = record.line if record is not None else LINE.name
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "pristine" if pristine else "default"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    folder, elsewhere = collection_path.parent.name, config.getoption("pristine") or config.getoption("package")
    # tests of the older line are only in every_line; what is about this repository, or compares two packages, is not
    # collected for another package unless a file is named
    left_out = config.stash[LINE_TESTED] != LINE.name and folder != "every_line"
    left_out |= bool(elsewhere) and folder in ("repo", "tool", "upstream")
    return True if left_out and not collection_path.is_dir() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("regression"):
            # for the report, from which test_regressions.py takes it
            item.user_properties.append(("regression", mark.args[0] if mark.args else "differs"))


def pytest_report_header() -> str:
    import x_transformers

    return f"x_transformers: {Path(x_transformers.__file__).parent}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the repository, to be changed."""
    return copy_project(tmp_path / "project")
