"""The build: what it gives, what it refuses, and that nobody's edits or settings come between."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging_support import (
    LINE,
    ROOT,
    build,
    call_backend,
    clean_environment,
    copy_project,
    edit,
    hatch_build,
    make_patch,
    offline,
    provenance,
    set_series,
    snapshot,
)

DPO = "x_transformers/dpo.py"
XVAL = "x_transformers/xval.py"
RECORD = provenance.RECORD_PATH
PENDING = provenance.PENDING_PATH
PIN = provenance.read_pin(ROOT / LINE / "upstream.txt")
BUILDS = ("build_wheel", "build_sdist", "build_editable")

Message = Callable[..., str]


@pytest.fixture(scope="session")
def release(wheelhouse: Path) -> hatch_build.Release:
    (wheel,) = wheelhouse.glob("*.whl")
    return hatch_build.load_release(wheel)


@pytest.fixture(scope="session")
def sdist(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    return build("build_sdist", copy_project(directory / "project"), directory / "out", offline(wheelhouse))


@pytest.fixture
def unpacked(sdist: Path, tmp_path: Path) -> Path:
    """An unpacked sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    return tmp_path / sdist.name[: -len(".tar.gz")]


@pytest.fixture
def refusal(wheelhouse: Path, tmp_path: Path) -> Message:
    """Run a build that must fail: with one message and without a result, a leftover or a change. Gives the message."""

    def run(hook: str, project: Path, environment: dict[str, str] | None = None) -> str:
        before, out, temporary = snapshot(project), tmp_path / "refused", tmp_path / "temporary"
        temporary.mkdir(exist_ok=True)
        environment = {**(environment or offline(wheelhouse)), "TMPDIR": str(temporary)}
        result = call_backend(hook, project, out, environment)
        assert result.returncode != 0
        assert "Traceback" not in result.stderr
        assert result.stderr.strip().startswith("error: ")
        assert result.stderr.count("\nerror: ") == 1
        assert not list(out.iterdir())
        assert not list(temporary.iterdir())
        assert snapshot(project) == before
        return result.stderr

    return run


def install_editable(project: Path, wheelhouse: Path, tmp_path: Path) -> Path:
    return build("build_editable", project, tmp_path / "editable", offline(wheelhouse))


def append(path: Path, text: str = "# edited\n") -> None:
    path.write_bytes(path.read_bytes() + text.encode())


# what a build gives


def test_wheel_is_the_patched_release_and_the_own_module(wheel: Path, release: hatch_build.Release) -> None:
    patches = hatch_build.read_patches(ROOT / LINE)
    expected = hatch_build.apply_series(release.files, patches)
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}

    own = {path for path in content if path.startswith("x_transformers/xpos/")}
    assert {path: content[path] for path in content.keys() - own} == expected
    sources = snapshot(ROOT / "x_transformers" / "xpos")
    assert own == {f"x_transformers/xpos/{path}" for path in sources if path.endswith(".py")} | {RECORD}


def test_record_in_the_wheel(wheel: Path, release: hatch_build.Release, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    record = provenance.read_record(tmp_path / "x_transformers")
    assert record is not None

    assert record.version == wheel.name.split("-")[1]
    assert (record.upstream_name, record.upstream_version) == (PIN.name, PIN.version)
    assert record.upstream_sha256 in PIN.hashes
    assert record.line == LINE.name
    assert tuple(patch.name for patch in record.patches) == provenance.read_series(ROOT / LINE)
    for patch in record.patches:
        content = (ROOT / LINE / patch.name).read_bytes()
        assert patch.sha256 == hashlib.sha256(content).hexdigest()
        assert f"] {patch.subject}\n".encode() in content.replace(b"\n ", b" ")
    assert set(record.files) == set(release.files)
    assert provenance.modified_files(tmp_path / "x_transformers") == ()
    assert provenance.staleness(tmp_path / "x_transformers") == ()

    append(tmp_path / DPO)
    (tmp_path / XVAL).unlink()
    assert provenance.modified_files(tmp_path / "x_transformers") == (DPO, XVAL)


def test_metadata_follows_upstream(wheel: Path, release: hatch_build.Release) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        ours = HeaderParser().parsestr(archive.read(name).decode())
    upstream = HeaderParser().parsestr(release.metadata)

    def requirements(metadata: object) -> set[str]:
        return set(metadata.get_all("Requires-Dist"))  # type: ignore[attr-defined]

    assert ours["Name"] == upstream["Name"]
    assert ours["Version"].split("+xpos.")[0] == upstream["Version"]
    assert ours["Requires-Python"] == upstream["Requires-Python"]
    assert requirements(ours) >= requirements(upstream)
    assert all("extra ==" in line for line in requirements(ours) - requirements(upstream))
    assert set(ours.get_all("Provides-Extra", [])) == {*upstream.get_all("Provides-Extra", []), "benchmark", "plot"}


def test_wheel_carries_both_licences_and_a_right_record_file(wheel: Path, release: hatch_build.Release) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    info = next(name for name in content if ".dist-info/" in name).split("/")[0]
    metadata = HeaderParser().parsestr(content[f"{info}/METADATA"].decode())
    licences = [content[f"{info}/licenses/{name}"] for name in metadata.get_all("License-File", [])]
    assert licences == [(ROOT / "LICENSE").read_bytes()]
    assert content[hatch_build.LICENSE_PATH] == release.files[hatch_build.LICENSE_PATH]

    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(content[f"{info}/RECORD"].decode()))}
    assert rows.pop(f"{info}/RECORD") == ["", ""]
    assert set(rows) == set(content) - {f"{info}/RECORD"}
    for name, (digest, size) in rows.items():
        encoded = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={encoded}", str(len(content[name])))


def test_same_bytes_from_another_path_and_umask(wheel: Path, sdist: Path, wheelhouse: Path, tmp_path: Path) -> None:
    project = copy_project(tmp_path / "a path with spaces" / "ünd more")
    for path in project.rglob("*"):
        path.chmod(stat.S_IRWXU if path.is_dir() else stat.S_IRUSR | stat.S_IWUSR)
    before = snapshot(project)
    environment = offline(wheelhouse, PYTHONHASHSEED="7", TZ="Asia/Tokyo")
    assert build("build_wheel", project, tmp_path / "out", environment, 0o077).read_bytes() == wheel.read_bytes()
    assert build("build_sdist", project, tmp_path / "out", environment, 0o077).read_bytes() == sdist.read_bytes()
    assert snapshot(project) == before


def test_sdist_builds_the_same_wheel_without_network_or_git(wheel: Path, unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    environment = clean_environment(PIP_NO_INDEX="1", PATH=str(tmp_path / "bin"))
    assert build("build_wheel", unpacked, tmp_path / "out", environment).read_bytes() == wheel.read_bytes()


def test_sdist_carries_what_its_own_build_and_tests_need(unpacked: Path, sdist: Path, tmp_path: Path) -> None:
    for name in ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    for folder in (LINE, Path("tests")):
        for path in (path for path in (ROOT / folder).iterdir() if path.is_file()):
            assert (unpacked / folder / path.name).read_bytes() == path.read_bytes()
    environment = clean_environment(PIP_NO_INDEX="1")
    assert build("build_sdist", unpacked, tmp_path / "out", environment).read_bytes() == sdist.read_bytes()


def test_empty_series_gives_the_pristine_release(
    project: Path, release: hatch_build.Release, wheelhouse: Path, tmp_path: Path
) -> None:
    set_series(project, {})
    with zipfile.ZipFile(build("build_wheel", project, tmp_path / "out", offline(wheelhouse))) as archive:
        assert {path: archive.read(path) for path in release.files} == release.files


# where the sources lie, and the user's settings


def test_inside_another_git_repository(wheel: Path, wheelhouse: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    project = copy_project(outer / "vendor" / "project")
    (outer / ".gitignore").write_text("*\n", encoding="utf-8")
    (outer / "temporary files").mkdir()
    subprocess.run(["git", "init", "-q", str(outer)], check=True)
    # the temporary directory lies in the repository too: there `git apply` would skip every file
    environment = offline(wheelhouse, TMPDIR=str(outer / "temporary files"))
    assert build("build_wheel", project, tmp_path / "out", environment).read_bytes() == wheel.read_bytes()


def test_hostile_git_settings(wheel: Path, project: Path, wheelhouse: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".config" / "git").mkdir(parents=True)
    (home / ".gitconfig").write_text(
        "[apply]\n\twhitespace = error-all\n\tignoreWhitespace = change\n[core]\n\tautocrlf = true\n\teol = crlf\n"
        "\twhitespace = tab-in-indent,indent-with-non-tab\n",
        encoding="utf-8",
    )
    (home / ".config" / "git" / "attributes").write_text("* text eol=crlf\n", encoding="utf-8")
    environment = offline(
        wheelhouse,
        HOME=str(home),
        GIT_CONFIG_COUNT="2",
        GIT_CONFIG_KEY_0="apply.whitespace",
        GIT_CONFIG_VALUE_0="fix",
        GIT_CONFIG_KEY_1="core.autocrlf",
        GIT_CONFIG_VALUE_1="true",
        LC_ALL="C.UTF-8",
        LANGUAGE="de",
    )
    assert build("build_wheel", project, tmp_path / "out", environment).read_bytes() == wheel.read_bytes()


@pytest.mark.parametrize("place", ["environment", "pip.conf"])
def test_pip_settings_that_are_meant_for_the_installation(
    place: str, wheel: Path, project: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    constraint = tmp_path / "their constraints.txt"
    constraint.write_text(f"{PIN}+xpos.1\nx-transformers @ https://example.invalid/a.zip\n")
    settings = {
        "constraint": str(constraint),
        "editable": str(tmp_path),
        "dry-run": "1",
        "ignore-installed": "1",
        "no-binary": ":all:",
        "prefix": str(tmp_path / "elsewhere"),
        "report": str(tmp_path / "report"),
        "require-virtualenv": "1",
        "target": str(tmp_path / "elsewhere"),
    }
    if place == "environment":
        settings.update({"python-version": "2.7", "requirement": str(constraint), "platform": "win32", "abi": "none"})
        variables = {f"PIP_{name.replace('-', '_').upper()}": value for name, value in settings.items()}
        environment = offline(wheelhouse, **variables)
    else:
        config = tmp_path / "pip.conf"
        config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        environment = offline(wheelhouse, PIP_CONFIG_FILE=str(config))
        environment["PIP_CONFIG_FILE"] = str(config)
    assert build("build_wheel", project, tmp_path / "out", environment).read_bytes() == wheel.read_bytes()
    assert not (tmp_path / "elsewhere").exists()


# the download


@pytest.mark.parametrize("hook", BUILDS)
def test_no_network(hook: str, project: Path, refusal: Message) -> None:
    message = refusal(hook, project, clean_environment(PIP_NO_INDEX="1"))
    assert f"could not download {PIN}" in message
    assert "No matching distribution" in message
    assert "PIP_FIND_LINKS" in message
    assert "sdist" in message


def test_index_that_does_not_answer(project: Path, refusal: Message) -> None:
    environment = clean_environment(PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0")
    assert f"could not download {PIN}" in refusal("build_wheel", project, environment)


def test_pin_with_another_hash(project: Path, refusal: Message) -> None:
    edit(project / LINE / "upstream.txt", "sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}")
    message = refusal("build_wheel", project)
    assert "DO NOT MATCH THE HASHES" in message
    assert "0" * 64 in message


def test_release_that_is_not_the_pinned_one(
    project: Path, release: hatch_build.Release, wheelhouse: Path, refusal: Message, tmp_path: Path
) -> None:
    (wheel,) = wheelhouse.glob("*.whl")
    doctored = tmp_path / "doctored"
    doctored.mkdir()
    shutil.copyfile(wheel, doctored / wheel.name)
    with zipfile.ZipFile(doctored / wheel.name, "a") as archive:
        archive.writestr("x_transformers/surprise.py", "import os\n")
    message = refusal("build_wheel", project, offline(doctored))
    assert "DO NOT MATCH THE HASHES" in message
    assert release.sha256 in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "x-transformers==2.31.10\n",
        f"x-transformers>=2.31.10 --hash=sha256:{'0' * 64}\n",
        f"x-transformers==2.31.* --hash=sha256:{'0' * 64}\n",
        f"x-transformers==2.31.10 --hash=md5:{'0' * 32}\n",
        "x-transformers==2.31.10 --hash=sha256:0123\n",
        f"x-transformers==2.31.10 --hash=sha256:{'0' * 64}\neinops==0.8.0 --hash=sha256:{'0' * 64}\n",
        f"--index-url https://example.invalid\nx-transformers==2.31.10 --hash=sha256:{'0' * 64}\n",
        f"x-transformers @ https://example.invalid/a.whl --hash=sha256:{'0' * 64}\n",
    ],
)
def test_malformed_pin(text: str, tmp_path: Path) -> None:
    path = tmp_path / "upstream.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(provenance.FormatError, match=r"upstream\.txt must hold exactly one requirement"):
        provenance.read_pin(path)


def test_pin_as_pip_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "upstream.txt"
    path.write_text(
        f"# why\nx-transformers==1.0 \\\n  --hash=sha256:{'0' * 64} \\\n  --hash=sha256:{'1' * 64}  # both\n"
    )
    assert provenance.read_pin(path) == provenance.Pin("x-transformers", "1.0", ("0" * 64, "1" * 64))


def test_malformed_pin_in_a_build(project: Path, refusal: Message) -> None:
    (project / LINE / "upstream.txt").write_text("x-transformers\n", encoding="utf-8")
    assert "patches/2.x/upstream.txt must hold exactly one requirement" in refusal("build_wheel", project)


def test_interpreter_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(hatch_build.BuildError, match="has no pip"):
        hatch_build.fetch_release(PIN)


def test_git_not_on_path(project: Path, wheelhouse: Path, refusal: Message, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    message = refusal("build_wheel", project, offline(wheelhouse, PATH=str(tmp_path / "bin")))
    assert "git is not on PATH" in message
    assert "install git" in message


# the series and the patches


def test_series_that_names_a_missing_file(project: Path, refusal: Message) -> None:
    set_series(project, {}, ["# a comment", "", "0001-missing.patch"])
    assert "series, line 3: patches/2.x/0001-missing.patch does not exist" in refusal("build_wheel", project)


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (b"a.patch\na.patch\n", "line 2: a.patch is named twice"),
        (b"a.patch b.patch\n", "line 1: one file name a line"),
        (b"a.patch -R\n", "line 1: one file name a line"),
        (b"../2.x/a.patch\n", "does not exist"),
    ],
)
def test_malformed_series(series: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.patch").touch()
    (tmp_path / "series").write_bytes(series)
    with pytest.raises(provenance.FormatError, match=message):
        provenance.read_series(tmp_path)


def test_series_in_quilts_format(tmp_path: Path) -> None:
    for name in ("b.patch", "a.patch", "not-in-the-series.patch"):
        (tmp_path / name).touch()
    (tmp_path / "series").write_bytes(b"# first\n\nb.patch\na.patch -p1 # second\n")
    assert provenance.read_series(tmp_path) == ("b.patch", "a.patch")


def test_patch_that_does_not_apply(project: Path, release: hatch_build.Release, refusal: Message) -> None:
    old = release.files[DPO]
    first, last = old.splitlines(keepends=True)[0], old.splitlines(keepends=True)[-1]
    foreign = old.replace(last, b"# not upstream's\n" + last)
    good = make_patch(XVAL, release.files[XVAL], b"# new\n" + release.files[XVAL])
    bad = make_patch(DPO, foreign, b"# new\n" + foreign.replace(last, last + b"# more\n"))
    set_series(project, {"0001-good.patch": good, "0002-bad.patch": bad})
    message = refusal("build_wheel", project)
    assert f"0002-bad.patch does not apply to {PIN}:" in message
    assert f"{DPO}: hunk 2, @@ -" in message
    assert "hunk 1" not in message
    assert first != last

    with pytest.raises(hatch_build.PatchError) as caught:
        hatch_build.apply_series(release.files, hatch_build.read_patches(project / LINE))
    assert caught.value.patch == "0002-bad.patch"
    assert [(hunk.path, hunk.number) for hunk in caught.value.hunks] == [(DPO, 2)]


def test_patch_of_a_file_that_the_release_lacks(project: Path, refusal: Message) -> None:
    set_series(project, {"0001-a.patch": make_patch("x_transformers/lacking.py", b"a\n", b"b\n")})
    message = refusal("build_wheel", project)
    assert "0001-a.patch does not apply" in message
    assert "x_transformers/lacking.py: No such file" in message


def test_patch_that_applies_only_with_an_offset(project: Path, release: hatch_build.Release, refusal: Message) -> None:
    old = release.files[DPO]
    moved = b"# moved\n# moved\n" + old
    patch = make_patch(DPO, moved, moved + b"# new\n")
    set_series(project, {"0001-moved.patch": patch})
    message = refusal("build_wheel", project)
    assert f"0001-moved.patch applies to {PIN} only at other lines" in message
    assert f"{DPO}: Hunk #1 succeeded at" in message
    assert "offset -2 lines" in message
    assert "Refresh the patch" in message

    patches = hatch_build.read_patches(project / LINE)
    assert hatch_build.apply_series(release.files, patches, allow_offsets=True)[DPO] == old + b"# new\n"


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (b"no patch at all\n", "is not a patch that git can read"),
        (b"", "is not a patch that git can read"),
        (make_patch("setup.py", None, b"a\n"), "may change upstream's files in x_transformers/ only"),
        (make_patch("x_transformers/../setup.py", None, b"a\n"), "x_transformers/ only"),
        (make_patch("../setup.py", None, b"a\n"), "x_transformers/ only"),
        (make_patch("x_transformers/xpos/check.py", None, b"a\n"), "x_transformers/ only"),
    ],
)
def test_patch_that_is_none_or_reaches_elsewhere(patch: bytes, message: str, release: hatch_build.Release) -> None:
    with pytest.raises(hatch_build.PatchError, match=f"0001-a.patch .*{message}"):
        hatch_build.apply_series(release.files, [hatch_build.Patch("0001-a.patch", patch)])


def test_patch_that_removes_or_renames_a_file(release: hatch_build.Release) -> None:
    rename = f"diff --git a/{DPO} b/x_transformers/b.py\nsimilarity index 100%\nrename from {DPO}\nrename to "
    patches = [
        hatch_build.Patch("0001-remove.patch", make_patch(XVAL, release.files[XVAL], None)),
        hatch_build.Patch("0002-rename.patch", f"{rename}x_transformers/b.py\n".encode()),
    ]
    files = hatch_build.apply_series(release.files, patches)
    assert release.files.keys() - files.keys() == {DPO, XVAL}
    assert files["x_transformers/b.py"] == release.files[DPO]


def test_patch_of_the_mode_alone(release: hatch_build.Release) -> None:
    # the package's files have no modes: such a patch would be named in the record and do nothing
    patch = f"diff --git a/{DPO} b/{DPO}\nold mode 100644\nnew mode 100755\n".encode()
    with pytest.raises(hatch_build.PatchError, match=f"left unchanged what it patches: {DPO}"):
        hatch_build.apply_series(release.files, [hatch_build.Patch("0001-a.patch", patch)])


# the metadata


def test_metadata_drift(project: Path, refusal: Message) -> None:
    edit(project / "pyproject.toml", '"einops[^"]*"', '"einops>=0.1"')
    edit(project / "pyproject.toml", r'\nversion = "', '\nversion = "9.')
    message = refusal("build_wheel", project)
    assert f'write: version = "{PIN.version}+xpos.1"' in message
    assert 'write: dependencies = ["einops>=' in message


def test_metadata_drift_of_each_field() -> None:
    metadata = """\
Name: upstream
Version: 1.2
Requires-Python: >=3.9
Requires-Dist: torch>=2.0
Requires-Dist: tomli; python_version < "3.11"
Provides-Extra: test
Provides-Extra: flash_attn
Requires-Dist: pytest; extra == 'test'
Requires-Dist: mock>=1; (python_version < "3.11") and extra == 'test'
Requires-Dist: flash-attn; extra == 'flash_attn'

body
"""
    release = hatch_build.Release("upstream", "1.2", "0" * 64, {}, metadata)
    dependencies = ["Torch >= 2.0", "tomli; python_version<'3.11'"]
    extras = {"test": ["pytest", 'mock>=1; python_version < "3.11"', "ours"], "flash-attn": ["flash_attn"], "own": []}

    def differences(
        version: str = "1.2+xpos.12",
        requires_python: str = ">=3.9",
        dependencies: list[str] = dependencies,
        extras: dict[str, list[str]] = extras,
    ) -> list[str]:
        return hatch_build.metadata_differences(
            release, version=version, requires_python=requires_python, dependencies=dependencies, extras=extras
        )

    assert differences() == []
    for version in ("1.2", "1.2+xpos", "1.2+xpos.0", "1.2.0+xpos.1", "1.3+xpos.1", "1.2+xpos.1.dev1"):
        assert differences(version=version) == [
            f'version is "{version}", write: version = "1.2+xpos.1" (or a later +xpos.<n>)'
        ]
    (message,) = differences(requires_python=">=3.10")
    assert message.endswith('write: requires-python = ">=3.9"')
    (message,) = differences(dependencies=[*dependencies, "numpy"])
    assert message.endswith('write: dependencies = ["tomli; python_version < \\"3.11\\"", "torch>=2.0"]')
    (message,) = differences(extras={**extras, "test": ["pytest"]})
    assert message == 'extra test lacks upstream\'s requirements, add: test = ["mock>=1; python_version < \\"3.11\\""]'
    (message,) = differences(extras={name: extras[name] for name in ("test", "own")})
    assert "flash-attn" in message


# an unpacked sdist


@pytest.mark.parametrize("hook", BUILDS)
def test_tampered_sdist(hook: str, unpacked: Path, refusal: Message) -> None:
    append(unpacked / DPO)
    (unpacked / XVAL).unlink()
    (unpacked / "x_transformers" / "surprise.py").touch()
    append(next((unpacked / LINE).glob("*.patch")))
    edit(unpacked / "pyproject.toml", r"\+xpos\.\d+", "+xpos.99")
    message = refusal(hook, unpacked)
    assert f"{DPO} was modified" in message
    assert f"{XVAL} is missing" in message
    assert "x_transformers/surprise.py was added" in message
    assert "the patches in patches/2.x/ are not those of the record" in message
    assert f"pyproject.toml has version {PIN.version}+xpos.99" in message


def test_sdist_with_another_pin_or_without_its_record(unpacked: Path, refusal: Message) -> None:
    edit(unpacked / LINE / "upstream.txt", "sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}")
    assert "upstream.txt pins another release" in refusal("build_wheel", unpacked)
    (unpacked / RECORD).write_text("{}", encoding="utf-8")
    assert "not a record" in refusal("build_wheel", unpacked)
    (unpacked / RECORD).unlink()
    assert f"this sdist lacks {RECORD}" in refusal("build_wheel", unpacked)


# an editable install


def test_editable_puts_files_there_that_git_ignores(
    project: Path, wheel: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(
            command, cwd=project, env=clean_environment(), text=True, stdout=subprocess.PIPE, check=True
        ).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    assert "x_transformers/xpos/provenance.py" in git("ls-files")
    with zipfile.ZipFile(install_editable(project, wheelhouse, tmp_path)) as archive:
        (pth,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert archive.read(pth).decode() == str(project)
        assert not [name for name in archive.namelist() if name.endswith(".py")]
    assert git("status", "--short") == ""
    assert not list((project / "x_transformers").glob(".*"))
    assert provenance.modified_files(project / "x_transformers") == ()
    assert provenance.staleness(project / "x_transformers") == ()

    # and what is there changes neither a wheel nor the next install
    assert build("build_wheel", project, tmp_path / "out", offline(wheelhouse)).read_bytes() == wheel.read_bytes()
    before = snapshot(project)
    install_editable(project, wheelhouse, tmp_path)
    assert snapshot(project) == before


def test_editable_follows_the_series(
    project: Path, release: hatch_build.Release, wheelhouse: Path, tmp_path: Path
) -> None:
    package = project / "x_transformers"
    new = "x_transformers/new.py"
    first = {
        "0001-new.patch": make_patch(new, None, b"a = 1\n"),
        "0002-dpo.patch": make_patch(DPO, release.files[DPO], release.files[DPO] + b"# one\n"),
    }
    set_series(project, first)
    install_editable(project, wheelhouse, tmp_path)
    assert (project / new).read_bytes() == b"a = 1\n"
    assert provenance.staleness(package) == ()

    set_series(project, first, list(reversed(first)))
    (message,) = provenance.staleness(package)
    assert "the order of the patches changed" in message

    set_series(
        project,
        {
            "0002-dpo.patch": make_patch(DPO, release.files[DPO], release.files[DPO] + b"# two\n"),
            "0003-xval.patch": make_patch(XVAL, release.files[XVAL], release.files[XVAL] + b"# three\n"),
        },
    )
    added, removed, changed = provenance.staleness(package)
    assert "patches added" in added
    assert "0003-xval.patch" in added
    assert "patches removed" in removed
    assert "0001-new.patch" in removed
    assert "patches changed" in changed
    assert "0002-dpo.patch" in changed
    assert provenance.REFRESH_COMMAND in added
    assert provenance.modified_files(package) == ()

    install_editable(project, wheelhouse, tmp_path)
    assert provenance.staleness(package) == ()
    assert not (project / new).exists()
    assert (project / DPO).read_bytes().endswith(b"# two\n")
    assert (project / XVAL).read_bytes().endswith(b"# three\n")

    edit(project / LINE / "upstream.txt", "sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}")
    (message,) = provenance.staleness(package)
    assert "the pin's hashes" in message
    edit(project / LINE / "upstream.txt", "==", "==9.")
    (message,) = provenance.staleness(package)
    assert f"the pin is {PIN.name}==9.{PIN.version} now" in message
    (project / LINE / "upstream.txt").write_text("", encoding="utf-8")
    (message,) = provenance.staleness(package)
    assert "upstream.txt must hold exactly one requirement" in message


@pytest.mark.parametrize("hook", BUILDS)
def test_local_edits_are_never_overwritten_or_left_out(
    hook: str, project: Path, wheelhouse: Path, refusal: Message, tmp_path: Path
) -> None:
    install_editable(project, wheelhouse, tmp_path)
    append(project / DPO)
    (project / "x_transformers" / "added.py").write_text("a = 1\n", encoding="utf-8")
    message = refusal(hook, project)
    assert f"\n  x_transformers/added.py\n  {DPO}\n" in message
    assert "turn the edits into a patch (patches/README.md says how)" in message
    assert "delete the files to discard them" in message

    # discarded as the message says
    (project / DPO).unlink()
    (project / "x_transformers" / "added.py").unlink()
    build(hook, project, tmp_path / "out", offline(wheelhouse))


def test_edits_that_became_a_patch_are_not_edits(
    project: Path, release: hatch_build.Release, wheelhouse: Path, tmp_path: Path
) -> None:
    set_series(project, {})
    install_editable(project, wheelhouse, tmp_path)
    append(project / DPO)
    set_series(project, {"0001-dpo.patch": make_patch(DPO, release.files[DPO], (project / DPO).read_bytes())})
    install_editable(project, wheelhouse, tmp_path)
    assert (project / DPO).read_bytes() == release.files[DPO] + b"# edited\n"
    assert provenance.staleness(project / "x_transformers") == ()


def test_upstream_files_without_a_record(
    project: Path, release: hatch_build.Release, wheelhouse: Path, refusal: Message, tmp_path: Path
) -> None:
    (project / DPO).write_bytes(release.files[DPO])
    (project / XVAL).write_bytes(b"# someone's\n")
    message = refusal("build_editable", project)
    assert f"\n  {XVAL}\n" in message
    assert DPO not in message
    (project / XVAL).unlink()
    install_editable(project, wheelhouse, tmp_path)


_INSTALL_AND_DIE = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from packaging_support import hatch_build
steps = 0
def dying(do):
    def step(*arguments, **options):
        global steps
        if steps == {survived}:
            os._exit(9)
        steps += 1
        return do(*arguments, **options)
    return step
os.replace, Path.unlink = dying(os.replace), dying(Path.unlink)
release = hatch_build.load_release(Path({wheel!r}))
patches = hatch_build.read_patches(Path({project!r}, 'patches', '2.x'))
files = hatch_build.apply_series(release.files, patches)
hatch_build.install_editable(Path({project!r}), files, hatch_build.make_record('0', '2.x', release, patches, files))
"""


@pytest.mark.parametrize("before", ["journal", "first file", "tenth file", "removal", "record", "end"])
def test_interrupted_editable_install(
    before: str, project: Path, release: hatch_build.Release, wheelhouse: Path, refusal: Message, tmp_path: Path
) -> None:
    """Killed at any step: the next run tells the old files from the new and from edits, and completes."""
    count = len(release.files)
    steps = ["journal", "first file", "removal", "record", "end"]
    survived = 10 if before == "tenth file" else steps.index(before) + (count - 1 if before not in steps[:2] else 0)
    package = project / "x_transformers"
    new = "x_transformers/new.py"
    old_series = {"0001-new.patch": make_patch(new, None, b"a = 1\n")}
    set_series(project, old_series)
    install_editable(project, wheelhouse, tmp_path)
    changed = {path: content + b"# patched\n" for path, content in release.files.items()}
    patches = {
        f"{i:04}-a.patch": make_patch(path, release.files[path], changed[path]) for i, path in enumerate(changed)
    }
    set_series(project, patches)

    (wheel,) = wheelhouse.glob("*.whl")
    script = _INSTALL_AND_DIE.format(
        tests=str(ROOT / "tests"), survived=survived, wheel=str(wheel), project=str(project)
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    done = [path for path in changed if (project / path).read_bytes() == changed[path]]
    assert len(done) == min(max(survived - 1, 0), count)
    assert (project / PENDING).exists() == (survived > 0)
    assert len(provenance.staleness(package)) > 0

    for path in (DPO, new):
        if not (project / path).exists():
            continue
        kept = (project / path).read_bytes()
        append(project / path)
        assert f"\n  {path}\n" in refusal("build_editable", project)
        (project / path).write_bytes(kept)

    install_editable(project, wheelhouse, tmp_path)
    assert {path: content for path, content in snapshot(project).items() if path in {*changed, new}} == changed
    assert not (project / PENDING).exists()
    assert not list(package.rglob(".*.new"))
    assert provenance.modified_files(package) == ()
    assert provenance.staleness(package) == ()


@pytest.mark.parametrize("path", [RECORD, PENDING])
def test_record_or_journal_that_cannot_be_read(
    path: str, project: Path, wheelhouse: Path, refusal: Message, tmp_path: Path
) -> None:
    install_editable(project, wheelhouse, tmp_path)
    (project / path).write_text("[]", encoding="utf-8")
    assert f"{path}, which tells a build's files from edited ones, cannot be read" in refusal("build_editable", project)
    (project / path).unlink()
    install_editable(project, wheelhouse, tmp_path)


# the front ends show the message, and nothing around it buries it


@pytest.mark.parametrize(
    "front_end",
    [
        ["build", "--no-isolation", "--wheel", "--outdir"],
        ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"],
    ],
    ids=["build", "pip"],
)
def test_front_end_shows_the_message(front_end: list[str], project: Path, wheelhouse: Path, tmp_path: Path) -> None:
    set_series(project, {}, ["0001-missing.patch"])
    out = tmp_path / "out"
    command = [sys.executable, "-m", *front_end, str(out), str(project)]
    environment = offline(wheelhouse)
    result = subprocess.run(command, env=environment, text=True, capture_output=True, check=False, cwd=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "error: patches/2.x/series, line 1: patches/2.x/0001-missing.patch does not exist" in output
    assert "Traceback" not in output
    assert not out.exists() or not os.listdir(out)
