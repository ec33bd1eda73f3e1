"""`patches/try_release.py`: what it says of a patch on another release, and of the properties on the result."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging_support import LINE, ROOT, hatch_build, make_patch, pristine_tree

from patches import try_release

NAME = "x_transformers/attend.py"
LINES = [f"line {number}\n" for number in range(40)]
OLD, NEW = "".join(LINES).encode(), "".join([*LINES[:20], "added\n", *LINES[20:]]).encode()
PATCH = hatch_build.Patch("0001-Add-a-line.patch", make_patch(NAME, OLD, NEW))
END = hatch_build.Patch("0002-Change-the-end.patch", make_patch(NAME, OLD, OLD.replace(b"line 39", b"the end")))
CONFLICTING = OLD.replace(b"line 20\n", b"another line 20\n")


def release(content: bytes) -> hatch_build.Release:
    return hatch_build.Release("x-transformers", "9.9.9", "", {NAME: content}, "")


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        (OLD, try_release.CLEAN),
        (b"one line more\n" + OLD, try_release.MOVED),
        (CONFLICTING, try_release.CONFLICT),
        (NEW, try_release.UPSTREAM),
        (b"one line more\n" + NEW, try_release.UPSTREAM),
    ],
)
def test_a_patch_on_another_release(content: bytes, outcome: str) -> None:
    ((attempt,), files) = try_release.attempt_series(release(content), [PATCH])

    assert attempt.outcome == outcome
    conflicts = outcome == try_release.CONFLICT
    assert (b"added\n" in files[NAME]) != conflicts
    assert [hunk.partition(", ")[0] for hunk in attempt.hunks] == [f"{NAME}: hunk 1"] * conflicts


def test_what_conflicts_stops_neither_what_follows_nor_the_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[bytes] = []

    def run_properties(found: dict[str, bytes], examples: str) -> tuple[bool, tuple[str, ...]]:
        files.append(found[NAME])
        return False, ("2 failed", "FAILED a", "FAILED b")

    monkeypatch.setattr(try_release, "download", lambda version: release(CONFLICTING))
    monkeypatch.setattr(try_release, "run_properties", run_properties)

    trial = try_release.try_release("9.9.9", [PATCH, END], examples="quick")
    # but there is nothing to say of a package without a single patch
    none = try_release.try_release("9.9.9", [PATCH], examples="quick")

    assert files == [CONFLICTING.replace(b"line 39", b"the end")]
    assert [attempt.outcome for attempt in trial.attempts] == [try_release.CONFLICT, try_release.CLEAN]
    assert (trial.applied, trial.held) == (False, False)
    assert "hunk 1" in try_release.report(trial)
    assert "| 9.9.9 | ✗ | ✓ | **2 fail** |" in try_release.table([trial])
    assert "| 9.9.9 | ✗ | not run |" in try_release.table([none])


def test_the_pinned_release_takes_the_series_and_the_table_is_put_between_its_marks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{try_release.BEGIN}old\n{try_release.END}after\n", encoding="utf-8")
    monkeypatch.setattr(try_release, "TABLE", page)
    version = (ROOT / LINE / "upstream.txt").read_text(encoding="utf-8").split()[0].partition("==")[2]

    assert try_release.main([version, "--no-properties", "--write"]) == 0

    said, names = capsys.readouterr().out, hatch_build.read_series(ROOT / LINE)
    assert all(f"  {name}: {try_release.CLEAN}\n" in said for name in names)
    before, _, table = page.read_text(encoding="utf-8").partition(try_release.BEGIN)
    assert f"| {version} | {' | '.join('✓' for _ in names)} | not run |\n\n{try_release.END}after\n" in table
    assert (before, "old" in table) == ("before\n", False)

    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(hatch_build.BuildError, match="lacks"):
        try_release.write_table("new\n")


def test_a_release_that_does_not_exist_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert try_release.main(["0.0.0.1"]) == 2
    assert "0.0.0.1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        try_release.main([])


@pytest.mark.slow
def test_properties_fail_on_the_unpatched_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(try_release, "PROPERTIES", ["tests/test_properties.py", "-k", "shifting_all or what_follows"])
    tree = pristine_tree() / "x_transformers"
    files = {f"x_transformers/{path.name}": path.read_bytes() for path in tree.glob("*.py")}

    held, said = try_release.run_properties(files, "pristine")

    assert not held
    assert said[0].startswith("1 failed, 1 passed")
    assert "test_shifting_all_positions_changes_rounding_alone" in said[1]
