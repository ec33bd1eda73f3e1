"""Every patch of every line: that it applies as it is, and that someone could merge it tomorrow."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging_support import BACKPORT, FIXES, LINE, ROOT, SPEED, git, hatch_build, make_repository, snapshot

LINES = [ROOT / BACKPORT, ROOT / LINE]
PATCHES = [line / name for line in LINES for name in hatch_build.read_series(line)]
(TESTS_PATCH,) = (ROOT / LINE / "tests-for-upstream").glob("*.patch")

# a backport is trusted at a glance, and what upstream's author reads once has lines no wider than those around it
MOST_CHANGED_LINES = 37
WIDE = 120
ONLY_FILE = "x_transformers/x_transformers.py"

each_line = pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)


@pytest.fixture(scope="session")
def releases() -> dict[str, hatch_build.Release]:
    """The pristine release of each line."""
    return {line.name: hatch_build.fetch_release(line / "upstream.txt") for line in LINES}


def message(patch: Path) -> tuple[str, str]:
    """The subject and the reason, what comes before the diff."""
    content = patch.read_bytes()
    body = email.message_from_bytes(content, policy=email.policy.default).get_content()
    subject = hatch_build.Patch(patch.name, content).subject
    return subject, re.split(r"^(?:---|diff --git .*)\n", body, flags=re.MULTILINE)[0]


def changed(patches: Iterable[Path], signs: str = "+") -> list[str]:
    """The lines that the patches add, or remove, blank ones aside."""
    diffs = (path.read_text(encoding="utf-8").partition("\ndiff --git")[2] for path in patches)
    # a line of its own is what names the file
    lines = [line[1:] for diff in diffs for line in diff.splitlines() if re.match(rf"[{signs}](?!\+\+ |-- )", line)]
    return [line for line in lines if line.strip()]


def of(line: str) -> list[Path]:
    return [patch for patch in PATCHES if patch.parent.name == line]


@each_line
def test_series_names_all_patches_in_numeric_order(line: Path) -> None:
    text = (line / "series").read_text(encoding="utf-8")
    # `git quiltimport` leaves out a last line without its end
    assert text == "" or text.endswith("\n")
    names = list(hatch_build.read_series(line))
    assert names == sorted(path.name for path in line.glob("*.patch"))
    assert [name[:5] for name in names] == [f"{number:04}-" for number in range(1, len(names) + 1)]


@each_line
def test_git_am_gives_what_the_build_gives(
    line: Path, releases: dict[str, hatch_build.Release], tmp_path: Path
) -> None:
    release, patches = releases[line.name], hatch_build.read_series(line)
    repository = tmp_path / "upstream"
    hatch_build.write_files(release.files, repository)
    make_repository(repository, "the pinned release")
    result = git(repository, "am", *(str(line / name) for name in patches))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""

    applied = {path: content for path, content in snapshot(repository).items() if not path.startswith(".git/")}
    assert applied == hatch_build.apply_series(release.files, hatch_build.read_patches(line))
    assert git(repository, "diff", "--name-only", ":/the pinned release").stdout.split() == [ONLY_FILE]
    subjects = git(repository, "log", "--reverse", "--format=%s").stdout.splitlines()[1:]
    assert subjects == [message(line / name)[0] for name in patches]


def test_a_backport_is_small() -> None:
    assert len(changed(of("1.27.x"), "+-")) <= MOST_CHANGED_LINES


def share_of_wide(lines: Iterable[str]) -> float:
    """How many of the lines are wide, messages of asserts and errors aside."""
    code = [line for line in lines if line.strip() and not re.match(r"\s*(assert|raise|message =) ", line)]
    return sum(len(line) > WIDE for line in code) / len(code)


def test_lines_are_no_wider_than_upstreams(releases: dict[str, hatch_build.Release]) -> None:
    upstream = releases["2.x"].files[ONLY_FILE].decode().splitlines()
    assert share_of_wide(changed(PATCHES)) <= share_of_wide(upstream)


def test_pull_requests_say_how_much_they_add() -> None:
    text = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"All is in `x_transformers\.py`: ([\d,]+) lines, ([\d,]+) characters", text)
    parts = (changed(of("2.x")[FIXES]), changed(of("2.x")[SPEED]))
    assert said == [(f"{len(part):,}", f"{sum(map(len, part)):,}") for part in parts]


@pytest.mark.parametrize("patch", [*PATCHES, TESTS_PATCH], ids=lambda patch: f"{patch.parent.name}/{patch.name[:4]}")
def test_is_a_commit_with_a_reason_and_exports_again_without_noise(patch: Path) -> None:
    """As `git format-patch --zero-commit --no-signature` writes it: no commit ids, no version of git."""
    subject, reason = message(patch)
    assert 0 < len(subject) <= 72
    assert not subject.endswith(".")
    assert len(reason.split()) >= 20, "a patch says why it exists"
    content = patch.read_bytes()
    assert content.startswith(b"From " + b"0" * 40 + b" ")
    assert not re.search(rb"^-- \n\d+\.\d+", content, flags=re.MULTILINE)
    assert b"\r" not in content
    assert content.endswith(b"\n")
