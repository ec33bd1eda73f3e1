"""`patches/try_release.py`: what it says of a patch on another release, and of the properties on the result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from trees import LINE, ROOT, hatch_build, pristine_tree

from patches import try_release

NAME = "x_transformers/attend.py"
LINES = [f"line {number}\n" for number in range(40)]
OLD, NEW = "".join(LINES).encode(), "".join([*LINES[:20], "added\n", *LINES[20:]]).encode()
CONFLICTING, NEARBY = OLD.replace(b"line 20\n", b"another line 20\n"), OLD.replace(b"line 18\n", b"another line 18\n")

CONFLICT = f"patch failed: {NAME}:18"


def release(content: bytes) -> hatch_build.Release:
    return hatch_build.Release("x-transformers", "9.9.9", "", {NAME: content})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def patches(repository: Path) -> list[Path]:
    """One that adds a line in the middle, and one on top of it that changes the end."""
    for content in (OLD, NEW, NEW.replace(b"line 39", b"the end")):
        try_release.commit(release(content), repository)
    try_release.run("git", "format-patch", "-2", "-o", "../patches", cwd=repository)
    return sorted((repository.parent / "patches").iterdir())


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        (OLD, "✓"),
        (b"one line more\n" + OLD, "✓ moved"),
        (NEARBY, "✓ merged"),
        (NEW, "upstream"),
        (b"one line more\n" + NEW, "upstream"),
        (CONFLICTING, "✗"),
    ],
)
def test_a_patch_on_another_release(content: bytes, outcome: str, patches: list[Path], repository: Path) -> None:
    try_release.commit(release(content), repository)
    found, conflict = try_release.try_patch(patches[0], repository)
    assert (found, conflict[: len(CONFLICT)]) == (outcome, CONFLICT if outcome == "✗" else "")
    assert (b"added\n" in (repository / NAME).read_bytes()) == (outcome != "✗")


def test_what_conflicts_stops_neither_what_follows_nor_the_properties(
    patches: list[Path], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bytes] = []

    def try_properties(tree: Path) -> list[str]:
        found.append((tree / NAME).read_bytes())
        return ["2 failed", "FAILED a", "FAILED b"]

    monkeypatch.setattr(try_release, "try_properties", try_properties)
    row, conflict, *failed = try_release.try_release(release(CONFLICTING), patches, repository)
    assert row == "| 9.9.9 | ✗ | ✓ moved | **2 fail** |"
    assert conflict.startswith(f"9.9.9 {patches[0].name}: {CONFLICT}")
    assert failed == ["9.9.9 2 failed", "9.9.9 FAILED a", "9.9.9 FAILED b"]
    assert found == [CONFLICTING.replace(b"line 39", b"the end")]


def test_the_pinned_release_takes_the_series(capsys: pytest.CaptureFixture[str]) -> None:
    version = (ROOT / LINE / "upstream.txt").read_text(encoding="utf-8").split()[0].partition("==")[2]
    names = hatch_build.read_series(ROOT / LINE)
    assert try_release.main([version, "--no-properties"]) == 0
    assert f"\n| {version} | {' | '.join('✓' for _ in names)} | not run |\n" in capsys.readouterr().out


def test_a_release_that_does_not_exist_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        try_release.main(["0.0.0.1"])
    assert "0.0.0.1" in capsys.readouterr().err


@pytest.mark.slow
def test_properties_fail_on_the_unpatched_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        try_release, "PROPERTIES", ["tests/xpos/test_properties.py", "-k", "shifting_all or what_follows"]
    )
    ignore = shutil.ignore_patterns("xpos")
    shutil.copytree(pristine_tree() / "x_transformers", tmp_path / "x_transformers", ignore=ignore)
    said, *failed = try_release.try_properties(tmp_path)
    assert said.startswith("1 failed, 1 passed")
    assert ["test_shifting_all_positions_changes_rounding_alone" in line for line in failed] == [True]
