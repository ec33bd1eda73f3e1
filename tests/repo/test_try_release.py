"""`patches/try_release.py`: what it says of a patch on another release, and of the properties on the result."""

from __future__ import annotations

from pathlib import Path

import pytest
from trees import LINE, PINNED, ROOT, hatch_build, release_files

from patches import try_release

NAME = "x_transformers/attend.py"
LINES = [f"line {number}\n" for number in range(40)]
OLD, NEW = "".join(LINES).encode(), "".join([*LINES[:20], "added\n", *LINES[20:]]).encode()
FAILED = ["2 failed", "FAILED a", "FAILED b"]
# what a release has, by what becomes of a patch on it
OUTCOMES = [
    (OLD, "✓"),
    (b"one line more\n" + OLD, "✓ moved"),
    (OLD.replace(b"line 18\n", b"another line 18\n"), "✓ merged"),
    (NEW, "upstream"),
    (b"one line more\n" + NEW, "upstream"),
    (OLD.replace(b"line 20\n", b"another line 20\n"), "✗"),
]


def release(content: bytes) -> hatch_build.Release:
    return hatch_build.Release("x-transformers", "9.9.9", "", {NAME: content})


@pytest.mark.parametrize(("content", "outcome"), OUTCOMES)
def test_a_release(content: bytes, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a patch that adds a line in the middle, and one on top of it that changes the end."""
    repository = tmp_path / "repository"
    for each in (OLD, NEW, NEW.replace(b"line 39", b"the end")):
        try_release.commit(release(each), repository)
    try_release.run("git", "format-patch", "-2", "-o", "../patches", cwd=repository)
    patches = sorted((tmp_path / "patches").iterdir())

    # what conflicts stops neither what follows nor the properties
    def try_properties(tree: Path) -> list[str]:
        assert b"the end" in (tree / NAME).read_bytes()
        return FAILED

    monkeypatch.setattr(try_release, "try_properties", try_properties)
    row, *failed = try_release.try_release(release(content), patches, repository)
    assert row.startswith(f"| 9.9.9 | {outcome} | ✓")
    assert row.endswith("| **2 fail** |")
    assert failed[-3:] == [f"9.9.9 {line}" for line in FAILED]
    conflicts = [line.startswith(f"9.9.9 {patches[0].name}: patch failed: {NAME}:18") for line in failed[:-3]]
    assert conflicts == ([True] if outcome == "✗" else [])
    assert (b"added\n" in (repository / NAME).read_bytes()) == (outcome != "✗")


def test_the_pinned_release_and_one_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    version = PINNED[LINE].partition("==")[2]
    assert try_release.main([version, "--no-properties"]) == 0
    row = f"| {version} | {'✓ | ' * len(hatch_build.read_series(ROOT / LINE))}not run |"
    assert row in capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit, match="2"):
        try_release.main(["0.0.0.1"])
    assert "0.0.0.1" in capsys.readouterr().err


@pytest.mark.slow
def test_properties_fail_on_the_unpatched_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = ["tests/xpos/every_line/test_properties.py", "-k", "shift or gradients"]
    monkeypatch.setattr(try_release, "PROPERTIES", properties)
    hatch_build.write_files(release_files(), tmp_path)
    said, failed = try_release.try_properties(tmp_path)
    assert said.startswith("1 failed, 1 passed")
    assert "test_property[shift]" in failed
