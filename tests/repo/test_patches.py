"""Every patch of every line: that it applies as it is, and that someone could merge it tomorrow."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from trees import (
    BACKPORT,
    FILES,
    LINE,
    ONLY_FILE,
    ROOT,
    TESTS_PATCHES,
    git,
    hatch_build,
    make_repository,
    pristine_tree,
    series_part,
)

SERIES = {line: [ROOT / line / name for name in hatch_build.read_series(ROOT / line)] for line in (BACKPORT, LINE)}
PATCHES = [*SERIES[BACKPORT], *SERIES[LINE]]

# a backport is trusted at a glance, and what upstream's author reads once has lines no wider than those around it
MOST_CHANGED_LINES = 45
WIDE = 120
# of what the parts add, in lines that are not blank and in characters
MOST_ADDED = {"A": (40, 3_050), "B": (45, 3_390), "C": (85, 5_150), "fork": (8, 600)}

each_line = pytest.mark.parametrize("line", SERIES, ids=lambda line: line.name)


def message(patch: Path) -> tuple[str, str]:
    """The subject and the reason, what comes before the diff."""
    content = patch.read_bytes()
    mail = email.message_from_bytes(content, policy=email.policy.default)
    subject = re.sub(r"^\[PATCH[^]]*\]\s*", "", " ".join(mail["Subject"].split()))
    return subject, re.split(r"^(?:---|diff --git .*)\n", mail.get_content(), flags=re.MULTILINE)[0]


def changed(patches: Iterable[Path], signs: str = "+") -> list[str]:
    """The lines that the patches add, or remove, blank ones aside."""
    diffs = (path.read_text(encoding="utf-8").partition("\ndiff --git")[2] for path in patches)
    # a line of its own is what names the file
    lines = [line[1:] for diff in diffs for line in diff.splitlines() if re.match(rf"[{signs}](?!\+\+ |-- )", line)]
    return [line for line in lines if line.strip()]


@each_line
def test_series_names_all_patches_in_numeric_order(line: Path) -> None:
    text = (ROOT / line / "series").read_text(encoding="utf-8")
    # `git quiltimport` leaves out a last line without its end
    assert text.endswith("\n")
    assert sorted(SERIES[line]) == sorted((ROOT / line).glob("*.patch"))
    assert [patch.name[:5] for patch in SERIES[line]] == [f"{n:04}-" for n in range(1, len(SERIES[line]) + 1)]


@each_line
def test_git_am_gives_what_the_build_gives(line: Path, tmp_path: Path) -> None:
    release, repository = hatch_build.fetch_release(ROOT / line / "upstream.txt"), tmp_path / "upstream"
    hatch_build.write_files(release.files, repository)
    make_repository(repository, "the pinned release")
    result = git(repository, "am", *map(str, SERIES[line]))
    # not a word about whitespace, a three-way merge or a fuzz
    assert (result.returncode, result.stderr) == (0, "")

    applied = {path: (repository / path).read_bytes() for path in git(repository, "ls-files").stdout.split()}
    assert applied == hatch_build.apply_series(release.files, hatch_build.read_patches(ROOT / line))
    assert {*git(repository, "diff", "--name-only", ":/the pinned release").stdout.split()} == FILES[line]
    subjects = git(repository, "log", "--reverse", "--format=%s").stdout.splitlines()[1:]
    assert subjects == [message(patch)[0] for patch in SERIES[line]]


def test_a_backport_is_small() -> None:
    assert len(changed(SERIES[BACKPORT], "+-")) <= MOST_CHANGED_LINES


def share_of_wide(lines: Iterable[str]) -> float:
    """How many of the lines are wide, messages of asserts and errors aside."""
    code = [line for line in lines if line.strip() and not re.match(r"\s*(assert|raise|message =) ", line)]
    return sum(len(line) > WIDE for line in code) / len(code)


def test_lines_are_no_wider_than_upstreams() -> None:
    upstream = (pristine_tree() / ONLY_FILE).read_text(encoding="utf-8").splitlines()
    assert share_of_wide(changed(PATCHES)) <= share_of_wide(upstream)


@pytest.mark.parametrize("part", MOST_ADDED)
def test_a_part_is_small_and_its_pull_request_says_how_much_it_adds(part: str) -> None:
    lines = changed(ROOT / LINE / name for name in series_part(part))
    added = len(lines), sum(map(len, lines))
    assert all(count <= most for count, most in zip(added, MOST_ADDED[part]))
    if part != "fork":
        text = (ROOT / LINE / "pull-requests" / f"{part}.md").read_text(encoding="utf-8")
        assert f"{added[0]} lines, {added[1]:,} characters" in " ".join(text.split())


def test_the_first_patch_is_the_threading_alone() -> None:
    first = SERIES[LINE][0]
    lines = changed([first])
    assert len(lines) <= 18
    assert sum(map(len, lines)) <= 1_200
    assert re.findall(r"^diff --git a/(\S+)", first.read_text(encoding="utf-8"), re.MULTILINE) == [ONLY_FILE]


def test_no_private_calls_of_torch_in_what_comes_before_speed() -> None:
    assert not [
        line for line in changed(ROOT / LINE / n for n in series_part("A") + series_part("B")) if "torch._C" in line
    ]


@pytest.mark.parametrize(
    "patch", [*PATCHES, *TESTS_PATCHES.values()], ids=lambda patch: f"{patch.parent.name}/{patch.name[:4]}"
)
def test_is_a_commit_with_a_reason_and_exports_again_without_noise(patch: Path) -> None:
    """As `git format-patch --zero-commit --no-signature` writes it: no commit ids, no version of git."""
    subject, reason = message(patch)
    # a longer one ends in the middle of a phrase as the name of a file
    assert 0 < len(subject) <= (72 if patch in TESTS_PATCHES.values() else 52)
    assert not subject.endswith(".")
    assert len(reason.split()) >= 20, "a patch says why it exists"
    content = patch.read_bytes()
    assert content.startswith(b"From " + b"0" * 40 + b" ")
    assert not re.search(rb"^-- \n\d+\.\d+", content, flags=re.MULTILINE)
    assert b"\r" not in content
    assert content.endswith(b"\n")
