"""That every line of the series is needed: undoing any block of what it changes makes a test fail."""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trees import FILES, LINE, ROOT, patched_tree, pristine_tree

pytestmark = pytest.mark.slow

# in the order in which they are likely to tell, cheap ones first; then all others
ORDER = [f"test_{name}.py" for name in ("scores", "properties", "features", "cache", "wrappers", "prefill", "options")]
XPOS = sorted((ROOT / "tests" / "xpos").rglob("test_*.py"), key=lambda path: [*ORDER, path.name].index(path.name))

# the patched files with one block of changes undone, by the file and the lines that the block has in it
UNDONE: dict[str, str] = {}
for file in sorted(FILES[LINE]):
    files = [tree / file for tree in (pristine_tree(), patched_tree())]
    old, new = (path.read_text(encoding="utf-8").splitlines(True) for path in files)
    for kind, start, end, new_start, new_end in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        # of a comment alone no test can tell
        changed = [line.strip() for line in old[start:end] + new[new_start:new_end]]
        if kind != "equal" and any(line and not line.startswith("#") for line in changed):
            UNDONE[f"{file}:{new_start + 1}-{new_end}"] = "".join(new[:new_start] + old[start:end] + new[new_end:])


@pytest.mark.parametrize("place", UNDONE)
def test_without_these_lines_a_test_fails(place: str, tmp_path: Path) -> None:
    shutil.copytree(patched_tree() / "x_transformers", tmp_path / "x_transformers")
    (tmp_path / place.partition(":")[0]).write_text(UNDONE[place], encoding="utf-8")

    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-n0", "-p", "no:cacheprovider"]
    command += [f"--package={tmp_path}", *map(str, XPOS), "tests/upstream/test_swap.py"]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "quick"}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    # a package that cannot even be imported is a usage error, or one of collection
    assert result.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), result.stdout
