"""Every patch of every line: that it applies as it is, and that someone could merge it tomorrow."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import trees
from trees import BACKPORT, FILES, LINE, ONLY_FILE, PARTS, ROOT, TESTS_PATCHES, git, hatch_build

SERIES = {line: [ROOT / line / name for name in hatch_build.read_series(ROOT / line)] for line in (BACKPORT, LINE)}
PATCHES = [*SERIES[BACKPORT], *SERIES[LINE]]

# of what is added, in lines that are not blank and in characters: the first patch is the threading alone
MOST_ADDED = {"A": (40, 3_050), "B": (45, 3_390), "C": (88, 5_300), "fork": (8, 600), "first": (18, 1_200)}
READ_AT_ONCE = {**PARTS, "first": PARTS["A"][:1]}


def message(patch: Path) -> tuple[str, str]:
    """The subject and the reason, what comes before the diff."""
    mail = email.message_from_bytes(patch.read_bytes(), policy=email.policy.default)
    subject = re.sub(r"^\[PATCH[^]]*\]\s*", "", " ".join(mail["Subject"].split()))
    return subject, mail.get_content().partition("---\n")[0]


def changed(patches: Iterable[Path], signs: str = "+") -> list[str]:
    """The lines that the patches add, or remove, blank ones aside."""
    diffs = (path.read_text(encoding="utf-8").partition("\ndiff --git")[2] for path in patches)
    # but those that name the file
    return re.findall(rf"^[{signs}](?!\+\+ |-- )(.*\S.*)$", "\n".join(diffs), re.MULTILINE)


@pytest.mark.parametrize("line", SERIES, ids=lambda line: line.name)
def test_git_am_gives_what_the_build_gives(line: Path, tmp_path: Path) -> None:
    # all patches in numeric order; `git quiltimport` leaves out a last line without its end
    assert SERIES[line] == sorted((ROOT / line).glob("*.patch"))
    assert [patch.name[:5] for patch in SERIES[line]] == [f"{n:04}-" for n in range(1, len(SERIES[line]) + 1)]
    assert (ROOT / line / "series").read_text(encoding="utf-8").endswith("\n")

    release, repository = trees.release_files(line), tmp_path / "upstream"
    hatch_build.write_files(release, repository)
    trees.make_repository(repository, "the pinned release")
    result = git(repository, "am", *map(str, SERIES[line]))
    # not a word about whitespace, a three-way merge or a fuzz
    assert (result.returncode, result.stderr) == (0, "")
    applied = {path: (repository / path).read_bytes() for path in git(repository, "ls-files").stdout.split()}
    assert applied == hatch_build.apply_series(release, hatch_build.read_patches(ROOT / line))
    assert {path for path in applied if applied[path] != release.get(path)} == FILES[line]
    subjects = git(repository, "log", "--reverse", "--format=%s").stdout.splitlines()[1:]
    assert subjects == [message(patch)[0] for patch in SERIES[line]]


def test_a_backport_is_small_the_first_patch_changes_one_file_and_lines_are_no_wider_than_upstreams() -> None:
    # it is trusted at a glance
    assert len(changed(SERIES[BACKPORT], "+-")) <= 45
    assert re.findall(r"^diff --git a/(\S+)", SERIES[LINE][0].read_text(encoding="utf-8"), re.MULTILINE) == [ONLY_FILE]

    def share_of_wide(lines: Iterable[str]) -> float:
        # messages of asserts and errors aside
        code = [line for line in lines if line.strip() and not re.match(r"\s*(assert|raise|message =) ", line)]
        return sum(len(line) > 120 for line in code) / len(code)

    assert share_of_wide(changed(PATCHES)) <= share_of_wide(trees.release_files()[ONLY_FILE].decode().splitlines())


@pytest.mark.parametrize("part", READ_AT_ONCE)
def test_a_part_is_small_and_its_pull_request_says_how_much_it_adds(part: str) -> None:
    lines = changed(ROOT / LINE / name for name in READ_AT_ONCE[part])
    added = len(lines), sum(map(len, lines))
    assert all(count <= most for count, most in zip(added, MOST_ADDED[part]))
    if part in TESTS_PATCHES:
        text = (ROOT / LINE / "pull-requests" / f"{part}.md").read_text(encoding="utf-8")
        assert f"{added[0]} lines, {added[1]:,} characters" in " ".join(text.split())
    # private calls of torch are about speed
    assert part == "C" or not any("torch._C" in line for line in lines)


@pytest.mark.parametrize("patch", [*PATCHES, *TESTS_PATCHES.values()], ids=lambda patch: patch.name[:4])
def test_is_a_commit_with_a_reason_and_exports_again_without_noise(patch: Path) -> None:
    """As `git format-patch --zero-commit --no-signature` writes it: no commit ids, no version of git."""
    subject, reason = message(patch)
    # a longer one ends in the middle of a phrase as the name of a file
    assert 0 < len(subject) <= (72 if patch in TESTS_PATCHES.values() else 52)
    assert not subject.endswith(".")
    assert len(reason.split()) >= 20, "a patch says why it exists"
    assert re.fullmatch(rb"From 0{40} [^\r]*\n", patch.read_bytes())
    assert not re.search(rb"^-- \n\d+\.\d+", patch.read_bytes(), flags=re.MULTILINE)
