"""The build of both lines: what it gives, what it refuses, and that nobody's settings come between."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trees
from packaging.requirements import Requirement
from trees import LINE, PINNED, ROOT, build, clean_environment, git, hatch_build, make_patch, provenance, snapshot

HOOKS = ("build_wheel", "build_sdist")
ATTEND, XVAL = "x_transformers/attend.py", "x_transformers/xval.py"


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose pip has nothing but the pinned releases."""
    wheelhouse = tmp_path_factory.mktemp("wheelhouse")
    for line in PINNED:  # from wherever the user's own pip finds packages
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheelhouse]
        trees.output(*command, "-r", ROOT / line / "upstream.txt")
    # pip splits it at spaces, of which a URI has none
    return clean_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=wheelhouse.as_uri(), WHEELHOUSE=str(wheelhouse))


class Line(NamedTuple):
    """A line as it is: the wheel of its pinned release, and what a build of it gives."""

    folder: Path
    upstream: Path
    wheel: Path
    sdist: Path


@pytest.fixture(scope="session", params=PINNED, ids=lambda folder: folder.name)
def line(request: pytest.FixtureRequest, offline: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder, directory = request.param, tmp_path_factory.mktemp("line")
    (upstream,) = Path(offline["WHEELHOUSE"]).glob(f"*-{PINNED[folder].partition('==')[2]}-*.whl")
    root = trees.package_root(trees.copy_project(directory / "project"), folder)
    return Line(folder, upstream, *(build(hook, root, directory / "out", offline) for hook in HOOKS))


# what a build gives


def test_wheel_is_the_patched_release_and_the_own_module_with_a_record_of_both(line: Line, tmp_path: Path) -> None:
    patches, release = hatch_build.read_patches(ROOT / line.folder), hatch_build.load_release(line.upstream)
    shutil.unpack_archive(line.wheel, tmp_path, "zip")
    content = snapshot(tmp_path)
    # the tests run on the same, and as upstream made it where the series is empty
    assert snapshot(trees.patched_tree(line.folder)) == content
    assert release.files.items() <= snapshot(trees.pristine_tree(line.folder)).items()

    record = provenance.read_record(tmp_path / "x_transformers")
    assert record is not None
    assert line.wheel.name == f"x_transformers-{record.version}-py3-none-any.whl"
    info = f"x_transformers-{record.version}.dist-info/"
    assert content[f"{info}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    own = {path: code for path, code in snapshot(ROOT / "x_transformers" / "xpos").items() if path.endswith(".py")}
    expected = hatch_build.apply_series(release.files, patches)
    expected.update((f"{hatch_build.OWN_MODULE}/{path}", code) for path, code in own.items())
    expected[provenance.RECORD_PATH] = record.to_json().encode()
    assert {path: code for path, code in content.items() if not path.startswith(info)} == expected

    pin = f"{record.upstream_name}=={record.upstream_version} --hash=sha256:{record.upstream_sha256}\n"
    assert pin == (ROOT / line.folder / "upstream.txt").read_text(encoding="utf-8")
    assert record.line == line.folder.name
    hashes = [(name, provenance.sha256(patch)) for name, patch in patches]
    assert [(applied.name, applied.sha256) for applied in record.patches] == hashes
    assert set(record.files) == set(release.files)
    assert provenance.modified_files(tmp_path / "x_transformers") == ()
    (tmp_path / ATTEND).write_bytes(b"# edited\n")
    (tmp_path / XVAL).unlink()
    assert provenance.modified_files(tmp_path / "x_transformers") == (ATTEND, XVAL)


def test_what_is_required_is_what_upstream_requires(line: Line) -> None:
    def metadata(wheel: Path) -> PathDistribution:
        return PathDistribution(zipfile.Path(wheel, f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/"))

    theirs, ours = metadata(line.upstream), metadata(line.wheel)
    assert re.fullmatch(rf"{re.escape(theirs.version)}\+xpos\.[1-9]\d*", ours.version)
    assert ours.metadata["Requires-Python"] == theirs.metadata["Requires-Python"]
    # but in the extra of the tests, which need a newer pytest, and in one that upstream lacks
    required, own = (
        {str(Requirement(line)) for line in wheel.requires or () if not re.search("extra == .(test|plot)", line)}
        for wheel in (theirs, ours)
    )
    assert own == required


def test_an_sdist_builds_the_same_without_network_or_git(line: Line, project: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(line.sdist, tmp_path)
    environment = clean_environment(PIP_NO_INDEX="1", PATH="/nowhere")
    unpacked = tmp_path / line.sdist.name[: -len(".tar.gz")]
    for hook, expected in zip(HOOKS, (line.wheel, line.sdist)):
        assert build(hook, unpacked, tmp_path / "out", environment).read_bytes() == expected.read_bytes()
    # the default line's has all that the checkout has, another line's what a build of it needs
    needed = {"hatch_build.py", "LICENSE", *(f"{line.folder.as_posix()}/{name}" for name in ("series", "upstream.txt"))}
    files = {name: code for name, code in snapshot(project).items() if line.folder == LINE or name in needed}
    assert files.items() <= snapshot(unpacked).items()


def test_what_the_tests_import_follows_the_checkout(
    offline: dict[str, str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "ROOT", project)
    monkeypatch.setattr(os, "environ", offline)
    own = "x_transformers/xpos/limits.py"
    content = {XVAL: RELEASE[XVAL], own: (project / own).read_bytes()}
    for edited in (XVAL, XVAL, own):
        content[edited] += NEW
        trees.set_series(project, {"0001-xval.patch": make_patch(XVAL, RELEASE[XVAL], content[XVAL])})
        (project / own).write_bytes(content[own])
        tree = trees.patched_tree()
        assert {path: (tree / path).read_bytes() for path in content} == content
    assert tree == trees.patched_tree()


# where the sources lie, and the user's settings


def no_longer_as_root() -> None:
    """Root becomes nobody, by CLONE_NEWUSER, or where a container forbids it no longer passes over the rights of files.

    That is CAP_DAC_OVERRIDE, 1, given up by PR_CAPBSET_DROP, 24.
    """
    libc = ctypes.CDLL(None)
    if os.getuid() == 0 and libc.unshare(0x10000000) != 0 and libc.prctl(24, 1, 0, 0, 0) != 0:
        raise OSError("root cannot give up the right to write everywhere")


NOT_ROOT: dict[str, Any] = dict(umask=0o077, preexec_fn=no_longer_as_root) if sys.platform == "linux" else {}
GIT_CONFIG = b"""
[core]\nautocrlf = true\neol = crlf\nwhitespace = tab-in-indent,indent-with-non-tab
[apply]\nwhitespace = error-all\nignoreWhitespace = change
"""
PIP_CONFIG = "[global]\nconstraint = {}\nno-binary = :all:\nrequire-virtualenv = 1\n"


def test_same_bytes_with_hostile_settings(line: Line, offline: dict[str, str], tmp_path: Path) -> None:
    home, outer, config = tmp_path / "home", tmp_path / "a spåce", tmp_path / "pip.conf"
    project, environment = trees.copy_project(outer / "project"), {**offline, "HOME": str(home)}
    hatch_build.write_files({".gitconfig": GIT_CONFIG, ".config/git/attributes": b"* text eol=crlf\n"}, home)
    environment.update(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="core.autocrlf", GIT_CONFIG_VALUE_0="true")
    # meant for the installation that the build is part of
    theirs = tmp_path / "their constraints.txt"
    theirs.write_text(f"{PINNED[LINE]}+xpos.1\nx-transformers @ https://example.invalid/a.zip\n", encoding="utf-8")
    config.write_text(PIP_CONFIG.format(theirs), encoding="utf-8")
    environment.update(PIP_CONFIG_FILE=str(config), PIP_REQUIREMENT=str(theirs), PIP_PYTHON_VERSION="2.7")
    environment.update(PIP_PLATFORM="win32", PIP_ABI="none")
    environment.update(LC_ALL="C.UTF-8", LANGUAGE="de", TZ="Asia/Tokyo", PYTHONHASHSEED="7")
    # a repository that ignores all; in it `git apply` would skip every temporary file
    git(outer, "init", "-q")
    hatch_build.write_files({".gitignore": b"*\n", "temporary files/a": b""}, outer)
    environment.update(TMPDIR=str(outer / "temporary files"))
    for path in [*project.rglob("*"), project]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    files = snapshot(project)
    for hook, expected in zip(HOOKS, (line.wheel, line.sdist)):
        made = build(hook, trees.package_root(project, line.folder), tmp_path / "out", environment, **NOT_ROOT)
        assert (made.name, made.read_bytes()) == (expected.name, expected.read_bytes())
    assert snapshot(project) == files


@pytest.mark.slow
def test_elsewhere_tests_pass_too(offline: dict[str, str], project: Path, tmp_path: Path) -> None:
    """For a user who is not root, where paths have spaces, in another locale, and with nothing that is set here."""
    project, temporary = project.rename(tmp_path / "a spåce"), tmp_path / "temporary files"
    temporary.mkdir()
    environment = {name: offline[name] for name in ("PATH", "PIP_NO_INDEX", "PIP_FIND_LINKS")}
    environment.update(HOME=str(tmp_path / "nowhere"), TMPDIR=str(temporary), LC_ALL="C", COLUMNS="40", FORCE_COLOR="1")
    environment.update(PYTHONWARNINGS="error:::hatch_build,error:::trees")
    tests = [f"tests/repo/test_{name}.py" for name in ("build", "patches", "try_release")]
    trees.output(sys.executable, "-m", "pytest", "-n0", *tests, cwd=project, env=environment, **NOT_ROOT)


# what a build refuses

HASH = "sha256:[0-9a-f]{64}"
WAY_OUT = "install from an sdist or a wheel of this package"
# an edit of a file in the folder of patches or of pyproject.toml, or a setting, by what the message must say
ERRORS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "hash": ("upstream.txt", HASH, f"sha256:{'0' * 64}", ("DO NOT MATCH THE HASHES", "0" * 64)),
    "no hash": ("upstream.txt", rf"\s+--hash={HASH}", "", ("Hashes are required",)),
    "two": ("upstream.txt", r"\Z", f"einops==0.8.0 --hash=sha256:{'0' * 64}\n", ("the one upstream release",)),
    "series": ("series", r"\A", "# a comment\n\n a.patch # b\n", ("2.x/series names a.patch, which does not exist",)),
    "patch": ("series", r"0001-.*\n", "", (f"0002-.* does not apply to {PINNED[LINE]} as it is:", "Rejected hunk #5")),
    "no line": ("../../pyproject.toml", '"patches/2.x"', '"patches/3.x"', ("must name a folder of patches", "3.x")),
    "no index": ("PIP_FIND_LINKS", "", "", (f"No matching distribution found for {PINNED[LINE]}", WAY_OUT)),
    "no git": ("PATH", "", "/nowhere", ("git is not on PATH", WAY_OUT)),
    "editable": ("hook", "", "build_editable", (rf"^error: {re.escape(hatch_build.NO_EDITABLE_INSTALL)}$",)),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_is_one_message_without_a_result_a_leftover_or_a_change(
    what: str, offline: dict[str, str], project: Path, tmp_path: Path
) -> None:
    name, pattern, replacement, messages = ERRORS[what]
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    environment = {**offline, "TMPDIR": str(temporary), "hook": "build_wheel"}
    if pattern:
        text, count = re.subn(pattern, replacement, (project / LINE / name).read_text(encoding="utf-8"))
        (project / LINE / name).write_text(text, encoding="utf-8")
        assert count == 1
    else:
        environment[name] = replacement
    command, files = trees.backend(environment.pop("hook"), out), snapshot(project)
    result = subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True)
    assert result.returncode != 0
    assert [*out.iterdir(), *temporary.iterdir()] == []
    assert snapshot(project) == files
    assert re.findall("(?m)^error: |Traceback", result.stderr) == ["error: "]
    assert [message for message in messages if not re.search(message, result.stderr.strip())] == []


@pytest.mark.parametrize("name", ["surprise/__init__.py", "x_transformers/xpos/__init__.py"])
def test_a_release_with_files_that_the_build_has_no_place_for(name: str, line: Line, tmp_path: Path) -> None:
    wheel = Path(shutil.copy(line.upstream, tmp_path))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(name, "import os\n")
    with pytest.raises(hatch_build.BuildError, match=f"holds {name}, which this build has no place for"):
        hatch_build.load_release(wheel)


def test_an_interpreter_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.output(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")))
    with pytest.raises(hatch_build.BuildError, match="has no pip"):
        hatch_build.fetch_release(ROOT / LINE / "upstream.txt")


# the series and the patches


RELEASE = trees.release_files()
OLD, NEW = RELEASE[ATTEND], b"# new\n"
LAST = OLD.splitlines(keepends=True)[-1]
FOREIGN, MOVED = OLD.replace(LAST, b"# not upstream's\n" + LAST), b"# moved\n# moved\n" + OLD
GOOD = make_patch(XVAL, RELEASE[XVAL], NEW + RELEASE[XVAL])


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (make_patch(ATTEND, FOREIGN, NEW + FOREIGN.replace(LAST, LAST + NEW)), "Rejected hunk #2"),
        (make_patch(ATTEND, MOVED, MOVED + NEW), r"Hunk #1 succeeded at \d+ \(offset -2 lines\)"),
        (b"no patch at all\n", "error: "),
        (b"", "error: "),
        (make_patch("setup.py", b"", NEW), "setup.py is not a file of upstream's package"),
        (make_patch("../setup.py", b"", NEW), "error: invalid path"),
        (make_patch("x_transformers/xpos/check.py", b"", NEW), "x_transformers/xpos/check.py is not a file of"),
        (make_patch("x_transformers/lacking.py", OLD, NEW), "x_transformers/lacking.py: No such file"),
        (f"diff --git a/{ATTEND} b/{ATTEND}\nold mode 100644\nnew mode 100755\n".encode(), "it changes nothing"),
    ],
)
def test_a_patch_that_does_not_apply_as_it_is_or_reaches_elsewhere(patch: bytes, message: str) -> None:
    patches = [hatch_build.Patch("0001-good.patch", GOOD), hatch_build.Patch("0002-bad.patch", patch)]
    with pytest.raises(hatch_build.PatchError, match=rf"(?s)^0002-bad.patch does not apply to .*  .*{message}"):
        hatch_build.apply_series(RELEASE, patches)
