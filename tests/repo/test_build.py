"""The build of both lines: what it gives, what it refuses, and that nobody's settings come between."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

import pytest
import trees
from trees import (
    BACKPORT,
    LINE,
    ROOT,
    build,
    call_backend,
    clean_environment,
    copy_project,
    edit,
    git,
    hatch_build,
    make_patch,
    offline,
    package_root,
    patched_tree,
    pristine_tree,
    provenance,
    set_series,
    snapshot,
)

DPO, XVAL = "x_transformers/dpo.py", "x_transformers/xval.py"
RECORD = provenance.RECORD_PATH
HOOKS = ("build_wheel", "build_sdist")
PINNED = "x-transformers==2.31.10"


class Line(NamedTuple):
    """A line as it is: its pinned release, and what a build of it gives."""

    folder: Path
    wheelhouse: Path
    release: hatch_build.Release
    wheel: Path
    sdist: Path

    def unpack(self, directory: Path) -> Path:
        with tarfile.open(self.sdist) as archive:
            archive.extractall(directory)
        return directory / self.sdist.name[: -len(".tar.gz")]

    def check(
        self, project: Path, out: Path, environment: dict[str, str], before: Callable[[], object] | None = None
    ) -> None:
        """Builds give the same bytes in this project too, and leave it as it is."""
        files = snapshot(project)
        for hook, expected in zip(HOOKS, (self.wheel, self.sdist)):
            made = build(hook, package_root(project, self.folder), out, environment, before)
            assert (made.name, made.read_bytes()) == (expected.name, expected.read_bytes())
        assert snapshot(project) == files


def build_line(folder: Path, directory: Path) -> Line:
    wheelhouse, pin = directory / "wheelhouse", str(ROOT / folder / "upstream.txt")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-r", pin, "-d", str(wheelhouse)]
    subprocess.run(command, check=True)  # from wherever the user's own pip finds packages
    (wheel,) = wheelhouse.glob("*.whl")
    root = package_root(copy_project(directory / "project"), folder)
    built = [build(hook, root, directory / "out", offline(wheelhouse)) for hook in HOOKS]
    return Line(folder, wheelhouse, hatch_build.load_release(wheel), *built)


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory) -> Line:
    return build_line(LINE, tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="session")
def backport(tmp_path_factory: pytest.TempPathFactory) -> Line:
    return build_line(BACKPORT, tmp_path_factory.mktemp("backport"))


@pytest.fixture(params=["default", "backport"])
def line(request: pytest.FixtureRequest) -> Line:
    found: Line = request.getfixturevalue(request.param)
    return found


# what a build gives


def test_wheel_is_the_patched_release_and_the_own_module_with_a_record_of_both(line: Line, tmp_path: Path) -> None:
    patches = hatch_build.read_patches(ROOT / line.folder)
    expected = hatch_build.apply_series(line.release.files, patches)
    with zipfile.ZipFile(line.wheel) as archive:
        archive.extractall(tmp_path)
    package = tmp_path / "x_transformers"
    content = {f"x_transformers/{path}": code for path, code in snapshot(package).items()}
    beside = (ROOT / hatch_build.OWN_MODULE).rglob("*.py")
    own = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in beside}
    assert content.pop(RECORD)
    assert content == {**expected, **own}
    # the tests run on the same, and as upstream made it where the series is empty
    assert snapshot(patched_tree(line.folder)) == snapshot(tmp_path)
    pristine = snapshot(pristine_tree(line.folder))
    assert {path: pristine[path] for path in line.release.files} == line.release.files

    record = provenance.read_record(package)
    assert record is not None
    pin = f"{record.upstream_name}=={record.upstream_version} --hash=sha256:{record.upstream_sha256}\n"
    assert (ROOT / line.folder / "upstream.txt").read_text(encoding="utf-8") == pin
    assert record.line == line.folder.name
    hashes = [(patch.name, hashlib.sha256(patch.content).hexdigest()) for patch in patches]
    assert [(applied.name, applied.sha256) for applied in record.patches] == hashes
    assert set(record.files) == set(line.release.files)

    assert line.wheel.name == f"x_transformers-{record.version}-py3-none-any.whl"
    licence = tmp_path / f"x_transformers-{record.version}.dist-info" / "licenses" / "LICENSE"
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()

    assert provenance.modified_files(package) == ()
    (package / "attend.py").write_bytes(b"# edited\n")
    (package / "xl_autoregressive_wrapper.py").unlink()
    names = [f"x_transformers/{name}.py" for name in ("attend", "xl_autoregressive_wrapper")]
    assert [*provenance.modified_files(package)] == names


def metadata(wheel: Path) -> tuple[Message, dict[str, set[str]]]:
    """The metadata of a wheel, and the requirements in it by their extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(name).decode())
    requirements: dict[str, set[str]] = {}
    for line in headers.get_all("Requires-Dist", []):
        requirement, _, extra = line.partition(" extra == ")
        requirements.setdefault(extra.strip("'"), set()).add(requirement.rstrip(";").replace(" ", ""))
    return headers, requirements


def test_what_is_required_is_what_upstream_requires(line: Line) -> None:
    (wheel,) = line.wheelhouse.glob("*.whl")
    (theirs, required), (ours, own) = metadata(wheel), metadata(line.wheel)
    assert re.fullmatch(rf"{re.escape(theirs['Version'])}\+xpos\.[1-9]\d*", ours["Version"])
    assert ours["Requires-Python"] == theirs["Requires-Python"]
    # there are more extras, and more in that of the tests, which need a newer pytest
    required.pop("test", None)
    assert {extra: own.get(extra) for extra in required} == required


def test_an_sdist_builds_the_same_without_network_or_git(line: Line, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    environment = clean_environment(PIP_NO_INDEX="1", PATH=str(tmp_path / "bin"))
    unpacked = line.unpack(tmp_path)
    for hook, expected in zip(HOOKS, (line.wheel, line.sdist)):
        assert build(hook, unpacked, tmp_path / "out", environment).read_bytes() == expected.read_bytes()
    names = ["hatch_build.py", "LICENSE", *(f"{line.folder.as_posix()}/{name}" for name in ("series", "upstream.txt"))]
    if line.folder == LINE:
        names += ["pyproject.toml", "README.md", "CHANGELOG.md", "constraints.txt", "patches/1.27.x/pyproject.toml"]
        names += [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    for name in names:
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


def test_what_the_tests_import_follows_the_checkout(
    default: Line, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "ROOT", project)
    monkeypatch.setattr(os, "environ", offline(default.wheelhouse))
    before, old, own = patched_tree(), default.release.files[DPO], "x_transformers/xpos/limits.py"
    set_series(project, {"0001-dpo.patch": make_patch(DPO, old, old + b"# a patch\n")})
    edit(project / own, r"\Z", "# edited\n")

    assert before != patched_tree() == patched_tree()
    assert (patched_tree() / DPO).read_bytes() == old + b"# a patch\n"
    assert (patched_tree() / own).read_bytes().endswith(b"# edited\n")


# where the sources lie, and the user's settings


def test_same_bytes_elsewhere_with_hostile_git_settings_inside_another_repository(line: Line, tmp_path: Path) -> None:
    outer, home = tmp_path / "a path with spaces", tmp_path / "home"
    project = copy_project(outer / "ünd more" / "project")
    for path in project.rglob("*"):
        path.chmod(stat.S_IRWXU if path.is_dir() else stat.S_IRUSR | stat.S_IWUSR)
    (outer / ".gitignore").write_text("*\n", encoding="utf-8")
    (outer / "temporary files").mkdir()
    git(outer, "init", "-q")
    (home / ".config" / "git").mkdir(parents=True)
    (home / ".gitconfig").write_text(
        "[apply]\n\twhitespace = error-all\n\tignoreWhitespace = change\n[core]\n\tautocrlf = true\n\teol = crlf\n"
        "\twhitespace = tab-in-indent,indent-with-non-tab\n",
        encoding="utf-8",
    )
    (home / ".config" / "git" / "attributes").write_text("* text eol=crlf\n", encoding="utf-8")
    settings = {"apply.whitespace": "fix", "core.autocrlf": "true"}
    variables = {"GIT_CONFIG_COUNT": str(len(settings)), "LC_ALL": "C.UTF-8", "LANGUAGE": "de", "HOME": str(home)}
    for number, (name, value) in enumerate(settings.items()):
        variables.update({f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value})
    # the temporary directory lies in the repository too: there `git apply` would skip every file
    variables.update(TMPDIR=str(outer / "temporary files"), PYTHONHASHSEED="7", TZ="Asia/Tokyo")
    line.check(project, tmp_path / "out", offline(line.wheelhouse, **variables), lambda: os.umask(0o077))


@pytest.mark.parametrize("place", ["environment", "pip.conf"])
def test_same_bytes_with_pip_settings_that_are_meant_for_the_installation(
    place: str, default: Line, project: Path, tmp_path: Path
) -> None:
    constraint = tmp_path / "their constraints.txt"
    constraint.write_text(f"{PINNED}+xpos.1\nx-transformers @ https://example.invalid/a.zip\n", encoding="utf-8")
    settings = {"constraint": str(constraint), "no-binary": ":all:", "require-virtualenv": "1"}
    environment = offline(default.wheelhouse)
    if place == "environment":
        settings.update({"python-version": "2.7", "requirement": str(constraint), "platform": "win32", "abi": "none"})
        environment.update({f"PIP_{name.replace('-', '_').upper()}": value for name, value in settings.items()})
    else:
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        (tmp_path / "pip.conf").write_text(f"[global]\n{lines}", encoding="utf-8")
        environment["PIP_CONFIG_FILE"] = str(tmp_path / "pip.conf")
    default.check(project, tmp_path / "out", environment)


@pytest.mark.parametrize(
    ("color", "selection"),
    [
        pytest.param("FORCE_COLOR", "wheel_is_the_patched_release or written_to or git_am or not_exist", id="some"),
        pytest.param("NO_COLOR", "", id="all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="rights are others elsewhere")
def test_elsewhere_tests_pass_too(
    color: str, selection: str, default: Line, backport: Line, project: Path, tmp_path: Path
) -> None:
    """For a user who is not root, where paths have spaces, in another locale, and with nothing that is set here."""
    project, temporary = project.rename(tmp_path / "a spåce"), tmp_path / "temporary files"
    temporary.mkdir()
    environment = dict(PATH=os.environ["PATH"], HOME=str(tmp_path / "nowhere"), TMPDIR=str(temporary))
    environment.update({"LC_ALL": "C", "COLUMNS": "40", color: "1"})
    environment.update(PYTHONWARNINGS="error:::hatch_build,error:::trees", PIP_NO_INDEX="1")
    environment.update(PIP_FIND_LINKS=f"{default.wheelhouse.as_uri()} {backport.wheelhouse.as_uri()}")
    tests = [f"tests/repo/test_{name}.py" for name in ("build", "patches", "try_release")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "--deselect", f"{tests[0]}::test_elsewhere", *tests, "-k", selection],
        cwd=project,
        env=environment,
        text=True,
        capture_output=True,
        umask=0o077,
        preexec_fn=no_longer_as_root,
    )
    assert result.returncode == 0, result.stdout + result.stderr


# what a build refuses: with one message, and without a result, a leftover or a change


def no_longer_as_root() -> None:
    """Root becomes nobody, by CLONE_NEWUSER, or where a container forbids it no longer passes over the rights of files.

    That is CAP_DAC_OVERRIDE, 1, given up by PR_CAPBSET_DROP, 24.
    """
    libc = ctypes.CDLL(None)
    if os.getuid() == 0 and libc.unshare(0x10000000) != 0 and libc.prctl(24, 1, 0, 0, 0) != 0:
        raise OSError("root cannot give up the right to write everywhere")


@pytest.mark.skipif(sys.platform != "linux", reason="rights are others elsewhere")
def test_a_tree_that_cannot_be_written_to(default: Line, project: Path, tmp_path: Path) -> None:
    for path in [*project.rglob("*"), project]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    default.check(project, tmp_path / "out", offline(default.wheelhouse), no_longer_as_root)


def refused(hook: str, project: Path, environment: dict[str, str], tmp_path: Path) -> str:
    """The one message of a build that must fail, without a result, a leftover or a change."""
    files, out, temporary = snapshot(project), tmp_path / "refused", tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    result = call_backend(hook, project, out, {**environment, "TMPDIR": str(temporary)})
    assert result.returncode != 0
    assert [*out.iterdir(), *temporary.iterdir()] == []
    assert snapshot(project) == files
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().startswith("error: ")
    assert result.stderr.count("\nerror: ") == 1
    return result.stderr


def test_an_editable_install_is_refused_with_what_to_do_instead(line: Line, project: Path, tmp_path: Path) -> None:
    root = package_root(project, line.folder)
    said = refused("build_editable", root, offline(line.wheelhouse), tmp_path)
    assert said.strip() == f"error: {hatch_build.NO_EDITABLE_INSTALL}"


HASH = "sha256:[0-9a-f]{64}"
WAY_OUT = "install from an sdist or a wheel of this package"
# an edit of a file in the folder of patches or of pyproject.toml, or a setting, by what the message must say
EDITS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "hash": ("upstream.txt", HASH, f"sha256:{'0' * 64}", ("DO NOT MATCH THE HASHES", "0" * 64)),
    "no hash": ("upstream.txt", rf"\s+--hash={HASH}", "", ("Hashes are required",)),
    "two": ("upstream.txt", r"\Z", f"einops==0.8.0 --hash=sha256:{'0' * 64}\n", ("the one upstream release",)),
    "series": ("series", r"\A", "# a comment\n\na.patch\n", ("2.x/series names a.patch, which does not exist",)),
    "patch": ("series", r"0001-.*\n", "", (f"0002-.* does not apply to {PINNED} as it is:", "Rejected hunk #5")),
    "no line": ("pyproject.toml", '"patches/2.x"', '"patches/3.x"', ("must name a folder of patches", "3.x")),
    "no index": ("PIP_FIND_LINKS", "", "", (f"No matching distribution found for {PINNED}", WAY_OUT)),
    "no git": ("PATH", "", "/nowhere", ("git is not on PATH", WAY_OUT)),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_checkout_or_an_environment_that_does_not_fit(
    what: str, default: Line, project: Path, tmp_path: Path
) -> None:
    name, pattern, replacement, messages = EDITS[what]
    environment = offline(default.wheelhouse)
    if pattern:
        edit(project / name if name == "pyproject.toml" else project / LINE / name, pattern, replacement)
    else:
        environment[name] = replacement
    said = refused("build_wheel", project, environment, tmp_path)
    assert [message for message in messages if not re.search(message, said)] == []


@pytest.mark.parametrize("name", ["surprise/__init__.py", "x_transformers/xpos/__init__.py"])
def test_a_release_with_files_that_the_build_has_no_place_for(name: str, default: Line, tmp_path: Path) -> None:
    (wheel,) = default.wheelhouse.glob("*.whl")
    shutil.copyfile(wheel, tmp_path / wheel.name)
    with zipfile.ZipFile(tmp_path / wheel.name, "a") as archive:
        archive.writestr(name, "import os\n")
    with pytest.raises(hatch_build.BuildError, match=f"holds {name}, which this build has no place for"):
        hatch_build.load_release(tmp_path / wheel.name)


def test_an_interpreter_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(hatch_build.BuildError, match="has no pip"):
        hatch_build.fetch_release(ROOT / LINE / "upstream.txt")


def test_an_sdist_that_was_changed_gives_a_package_that_says_so_or_none(default: Line, tmp_path: Path) -> None:
    unpacked, environment = default.unpack(tmp_path), clean_environment(PIP_NO_INDEX="1")
    (unpacked / DPO).write_text("# edited\n", encoding="utf-8")
    with zipfile.ZipFile(build("build_wheel", unpacked, tmp_path / "out", environment)) as archive:
        archive.extractall(tmp_path / "package")
    assert provenance.modified_files(tmp_path / "package" / "x_transformers") == (DPO,)
    (unpacked / RECORD).write_text("{}", encoding="utf-8")
    assert "not a record" in refused("build_wheel", unpacked, environment, tmp_path)
    (unpacked / RECORD).unlink()
    assert f"this sdist lacks {RECORD}" in refused("build_wheel", unpacked, environment, tmp_path)


# the series and the patches


def test_series_is_in_quilts_format(tmp_path: Path) -> None:
    for name in ("b.patch", "a.patch", "not-in-the-series.patch"):
        (tmp_path / name).touch()
    (tmp_path / "series").write_text("# first\n\nb.patch\n a.patch # second\n", encoding="utf-8")
    assert hatch_build.read_series(tmp_path) == ("b.patch", "a.patch")


def test_a_patch_that_does_not_apply_or_only_at_other_lines(default: Line) -> None:
    old = default.release.files[DPO]
    last = old.splitlines(keepends=True)[-1]
    foreign, moved = old.replace(last, b"# not upstream's\n" + last), b"# moved\n# moved\n" + old
    good = make_patch(XVAL, default.release.files[XVAL], b"# new\n" + default.release.files[XVAL])
    for bad, message in [
        (make_patch(DPO, foreign, b"# new\n" + foreign.replace(last, last + b"# more\n")), "Rejected hunk #2"),
        (make_patch(DPO, moved, moved + b"# new\n"), r"Hunk #1 succeeded at \d+ \(offset -2 lines\)"),
    ]:
        patches = [hatch_build.Patch("0001-good.patch", good), hatch_build.Patch("0002-bad.patch", bad)]
        with pytest.raises(hatch_build.PatchError, match=rf"(?s)^0002-bad.patch does not apply to .*  {message}"):
            hatch_build.apply_series(default.release.files, patches)


MODE = f"diff --git a/{DPO} b/{DPO}\nold mode 100644\nnew mode 100755\n".encode()


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (b"no patch at all\n", "error: "),
        (b"", "error: "),
        (make_patch("setup.py", None, b"a\n"), "setup.py is not a file of upstream's package"),
        (make_patch("../setup.py", None, b"a\n"), "error: invalid path"),
        (make_patch("x_transformers/xpos/check.py", None, b"a\n"), "x_transformers/xpos/check.py is not a file of"),
        (make_patch("x_transformers/lacking.py", b"a\n", b"b\n"), "x_transformers/lacking.py: No such file"),
        (MODE, "it changes nothing"),
    ],
)
def test_a_patch_that_is_none_or_reaches_elsewhere(patch: bytes, message: str, default: Line) -> None:
    with pytest.raises(hatch_build.PatchError, match=rf"(?s)0001-a.patch does not apply to .*  .*{message}"):
        hatch_build.apply_series(default.release.files, [hatch_build.Patch("0001-a.patch", patch)])


def test_a_patch_that_adds_or_removes_a_file(default: Line) -> None:
    new = "x_transformers/b.py"
    patch = make_patch(new, None, b"b\n") + make_patch(XVAL, default.release.files[XVAL], None)
    files = hatch_build.apply_series(default.release.files, [hatch_build.Patch("0001-a.patch", patch)])
    assert files == {**{path: code for path, code in default.release.files.items() if path != XVAL}, new: b"b\n"}
