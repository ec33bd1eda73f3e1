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

# the patched files with one block of changes undone, by the line, the file, and the lines that the block has in it
UNDONE: dict[tuple[Path, str, str], str] = {}
for line, file in [(line, file) for line, files in FILES.items() for file in sorted(files)]:
    paths = [tree / file for tree in (pristine_tree(line), patched_tree(line))]
    old, new = (path.read_text(encoding="utf-8").splitlines(True) for path in paths)
    for kind, start, end, new_start, new_end in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        # of a comment alone no test can tell
        changed = [code.strip() for code in old[start:end] + new[new_start:new_end]]
        if kind != "equal" and any(code and not code.startswith("#") for code in changed):
            undone = new[:new_start] + old[start:end] + new[new_end:]
            UNDONE[line, file, f"{new_start + 1}-{new_end}"] = "".join(undone)


@pytest.mark.parametrize("place", UNDONE, ids=lambda place: ":".join(map(str, place)))
def test_without_these_lines_a_test_fails(place: tuple[Path, str, str], tmp_path: Path) -> None:
    line, file, _ = place
    shutil.copytree(patched_tree(line) / "x_transformers", tmp_path / "x_transformers")
    (tmp_path / file).write_text(UNDONE[place], encoding="utf-8")

    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-n0", "-p", "no:cacheprovider"]
    tests = [*XPOS, "tests/upstream/test_swap.py"] if line == LINE else ["tests/xpos/every_line"]
    command += [f"--package={tmp_path}", *map(str, tests)]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "quick"}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    # a package that cannot even be imported is a usage error, or one of collection
    assert result.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), result.stdout
