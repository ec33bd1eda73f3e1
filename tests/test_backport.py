"""The line 1.27.x, a package root in its own folder: what its build gives, and its tests on what that gave."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import torch
from packaging_support import (
    BACKPORT,
    LINE,
    ROOT,
    build,
    call_backend,
    clean_environment,
    copy_project,
    download_pinned_release,
    edit,
    git,
    hatch_build,
    offline,
    package_root,
    patched_tree,
    pristine_tree,
    provenance,
    snapshot,
)
from test_regressions import Outcome, read

VERSION = "1.27.5+xpos.1"
TESTS = ROOT / "tests" / "line_1_27"
RECORD = provenance.RECORD_PATH
FIX = "x_transformers/x_transformers.py"
NAME_ERROR = "NameError: name 'seq_len' is not defined"


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return download_pinned_release(tmp_path_factory.mktemp("wheelhouse"), BACKPORT)


@pytest.fixture(scope="module")
def release(wheelhouse: Path) -> hatch_build.Release:
    (wheel,) = wheelhouse.glob("*.whl")
    return hatch_build.load_release(wheel)


@pytest.fixture(scope="module")
def built(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist of the line as it is."""
    directory = tmp_path_factory.mktemp("built")
    project = package_root(copy_project(directory / "project"), BACKPORT)
    assert project.name == BACKPORT.name
    return {name: build(f"build_{name}", project, directory / name, offline(wheelhouse)) for name in ("wheel", "sdist")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_project(tmp_path / "project")


@pytest.fixture
def unpacked(built: dict[str, Path], tmp_path: Path) -> Path:
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path)
    return tmp_path / built["sdist"].name[: -len(".tar.gz")]


# what a build gives


def test_wheel_is_the_patched_release_and_the_own_module(
    built: dict[str, Path], release: hatch_build.Release, tmp_path: Path
) -> None:
    expected = hatch_build.apply_series(release.files, hatch_build.read_patches(ROOT / BACKPORT))
    with zipfile.ZipFile(built["wheel"]) as archive:
        content = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path)
    own = {f"x_transformers/xpos/{path}": code for path, code in snapshot(ROOT / "x_transformers" / "xpos").items()}
    expected.update({path: code for path, code in own.items() if path.endswith(".py")})
    assert {path: code for path, code in content.items() if path != RECORD} == expected
    assert {path for path in release.files if content[path] != release.files[path]} == {FIX}

    record = provenance.read_record(tmp_path / "x_transformers")
    assert record is not None
    assert (record.version, record.line, record.upstream_version) == (VERSION, BACKPORT.name, "1.27.5")
    assert tuple(patch.name for patch in record.patches) == provenance.read_series(ROOT / BACKPORT)
    assert provenance.modified_files(tmp_path / "x_transformers") == ()
    assert provenance.staleness(tmp_path / "x_transformers") == ()


def test_metadata_is_upstreams(built: dict[str, Path], release: hatch_build.Release) -> None:
    assert built["wheel"].name == f"x_transformers-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(built["wheel"]) as archive:
        info = f"x_transformers-{VERSION}.dist-info"
        ours = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert archive.read(hatch_build.LICENSE_PATH) == release.files[hatch_build.LICENSE_PATH]
    upstream = HeaderParser().parsestr(release.metadata)

    assert (ours["Name"], ours["Version"]) == (upstream["Name"], VERSION)
    assert ours["Requires-Python"] is upstream["Requires-Python"] is None
    assert ours.get_all("Provides-Extra") == ["plot"]
    required = {line.replace(" ", "") for line in ours.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == {line.replace(" ", "") for line in upstream.get_all("Requires-Dist", [])}


def test_same_bytes_from_another_path(built: dict[str, Path], wheelhouse: Path, tmp_path: Path) -> None:
    project = copy_project(tmp_path / "a path with spaces" / "ünd more")
    environment = offline(wheelhouse, PYTHONHASHSEED="7", TZ="Asia/Tokyo")
    before = snapshot(project)
    for name, made in built.items():
        again = build(f"build_{name}", package_root(project, BACKPORT), tmp_path / "out", environment, 0o077)
        assert again.read_bytes() == made.read_bytes()
    assert snapshot(project) == before


def test_sdist_builds_the_same_without_network_or_git(built: dict[str, Path], unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    environment = clean_environment(PIP_NO_INDEX="1", PATH=str(tmp_path / "bin"))
    for name, made in built.items():
        assert build(f"build_{name}", unpacked, tmp_path / "out", environment).read_bytes() == made.read_bytes()


def test_sdist_holds_what_its_build_reads(unpacked: Path) -> None:
    inputs = ["hatch_build.py", "LICENSE", *(f"{BACKPORT.as_posix()}/{name}" for name in ("series", "upstream.txt"))]
    inputs += [f"{BACKPORT.as_posix()}/{name}" for name in provenance.read_series(ROOT / BACKPORT)]
    for path in inputs:
        assert (unpacked / path).read_bytes() == (ROOT / path).read_bytes()
    found = {path for path in snapshot(unpacked) if not path.startswith("x_transformers/")}
    assert found == {*inputs, ".gitignore", "PKG-INFO", "pyproject.toml"}

    # the hook is beside it there, and nothing else differs
    edit(unpacked / "pyproject.toml", 'path = "hatch_build.py"', 'path = "../../hatch_build.py"')
    assert (unpacked / "pyproject.toml").read_bytes() == (ROOT / BACKPORT / "pyproject.toml").read_bytes()


def test_tampered_sdist(unpacked: Path, tmp_path: Path) -> None:
    with (unpacked / FIX).open("a", encoding="utf-8") as file:
        file.write("# edited\n")
    (unpacked / BACKPORT / "series").write_text("", encoding="utf-8")
    result = call_backend("build_wheel", unpacked, tmp_path / "out", clean_environment(PIP_NO_INDEX="1"))
    assert result.returncode != 0
    assert f"{FIX} was modified" in result.stderr
    assert "the patches in patches/1.27.x/ are not those of the record" in result.stderr


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        ('"einops[^"]*"', '"einops>=0.8.0"', 'write: dependencies = ["einops >=0.7.0", "torch >=1.6"]'),
        (r"\nversion = ", '\nrequires-python = ">=3.9"\nversion = ', "upstream has none: remove it"),
        ("line = .*", 'line = "patches/1.28.x"', "must name a folder of patches, not 'patches/1.28.x'"),
    ],
    ids=["dependencies", "requires-python", "line"],
)
def test_pyproject_that_does_not_fit(
    pattern: str, replacement: str, message: str, project: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    root = package_root(project, BACKPORT)
    edit(root / "pyproject.toml", pattern, replacement)
    result = call_backend("build_wheel", root, tmp_path / "out", offline(wheelhouse))
    assert result.returncode != 0
    assert result.stderr.strip().startswith("error: ")
    assert message in result.stderr


# an editable install, beside the default line


def test_editable_is_a_package_of_its_own(
    project: Path, built: dict[str, Path], wheelhouse: Path, tmp_path: Path
) -> None:
    root = package_root(project, BACKPORT)
    package = root / "x_transformers"
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "all")
    with zipfile.ZipFile(build("build_editable", root, tmp_path / "editable", offline(wheelhouse))) as archive:
        (pth,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert archive.read(pth).decode() == str(root)
    with zipfile.ZipFile(built["wheel"]) as archive:
        assert {path.relative_to(root).as_posix() for path in package.rglob("*") if path.is_file()} == {
            path for path in archive.namelist() if ".dist-info/" not in path
        }
    assert git(project, "status", "--short").stdout == ""
    assert provenance.modified_files(package) == provenance.staleness(package) == ()

    # it changes neither a build of the line nor one of the default line
    assert build("build_wheel", root, tmp_path / "out", offline(wheelhouse)).read_bytes() == built["wheel"].read_bytes()
    default = download_pinned_release(tmp_path / "wheelhouse", LINE)
    with tarfile.open(build("build_sdist", project, tmp_path / "out", offline(default))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert f"{BACKPORT.as_posix()}/pyproject.toml" in names
    assert not [name for name in names if name.startswith(f"{BACKPORT.as_posix()}/x_transformers")]

    # a changed series makes it stale, an edit is kept, and each message has the command of this line
    command = "pip install -c constraints.txt -e patches/1.27.x"
    edit(root / "series", r"^0001-.*\n", "")
    (message,) = provenance.staleness(package)
    assert message.startswith("patches removed since")
    assert message.endswith(f"refresh with: {command}")
    git(project, "checkout", "-q", ".")
    for path in (package / "attend.py", package / "xpos" / "text.py"):
        kept = path.read_bytes()
        path.write_bytes(kept + b"# edited\n")
        result = call_backend("build_editable", root, tmp_path / "refused", offline(wheelhouse))
        assert result.returncode != 0
        assert f"\n  {path.relative_to(root).as_posix()}\n" in result.stderr
        assert f"then run: {command}\n" in result.stderr
        path.write_bytes(kept)


# into an environment, from where README says


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the files of this one as they are."""
    repository = copy_project(tmp_path_factory.mktemp("checkout") / "repository")
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "all")
    return repository


@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize(
    "source",
    ["./patches/1.27.x", "git+file://{checkout}#subdirectory=patches/1.27.x"],
    ids=["folder", "git"],
)
def test_install(installer: str, source: str, checkout: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, str(venv)], check=True)
    install = {
        "pip": ["pip", "--python", str(python), "install", "--quiet"],
        "uv": ["uv", "pip", "install", "--quiet", "--python", str(python)],
    }
    command = [sys.executable, "-m", *install[installer], "--no-deps", source.format(checkout=checkout)]
    # isolated, so the build's own requirements come from wherever the user's settings say
    subprocess.run(command, cwd=checkout, check=True)

    script = (
        "from importlib.metadata import files, version; "
        "print(version('x-transformers'), *(f.locate() for f in files('x-transformers') if f.name == '__init__.py'))"
    )
    output = subprocess.run([str(python), "-c", script], cwd=tmp_path, text=True, stdout=subprocess.PIPE, check=True)
    version, *modules = output.stdout.split()
    assert version == VERSION
    assert [Path(module).parent.name for module in modules] == ["x_transformers", "xpos"]
    record = provenance.read_record(Path(modules[0]).parent)
    assert record is not None
    assert record.line == BACKPORT.name
    assert provenance.modified_files(Path(modules[0]).parent) == ()
    assert git(checkout, "status", "--short", "--ignored").stdout == ""


# its tests, on the line and on the pristine release


def run_tests(tree: Path, report: Path, **variables: str) -> tuple[int, list[Outcome]]:
    command = [sys.executable, "-m", "pytest", f"--package={tree}", "--tb=no", "-q", f"--junitxml={report}", str(TESTS)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert result.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), result.stdout + result.stderr
    return result.returncode, read(report)


def test_its_tests_pass(tmp_path: Path) -> None:
    status, outcomes = run_tests(patched_tree(BACKPORT), tmp_path / "report.xml")
    assert [(outcome.name, outcome.failure) for outcome in outcomes if outcome.failure is not None] == []
    assert status == pytest.ExitCode.OK
    assert len(outcomes) > 50


def test_regression_tests_fail_on_the_pristine_release(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """With the NameError alone: until that is out of the way nothing else can be wrong."""
    _, outcomes = run_tests(pristine_tree(BACKPORT), tmp_path / "report.xml", HYPOTHESIS_PROFILE="pristine")
    assert len([outcome for outcome in outcomes if outcome.reason]) > 50
    for name, reason, failure in outcomes:
        with subtests.test(name):
            assert (failure == NAME_ERROR) if reason else (failure is None)


def test_without_xpos_every_bit_is_upstreams_and_checkpoints_load_both_ways(tmp_path: Path) -> None:
    script = TESTS / "plain_outputs.py"
    trees = {"pristine": pristine_tree(BACKPORT), "patched": patched_tree(BACKPORT)}

    def run(tree: str, *arguments: str) -> None:
        path = os.pathsep.join([str(trees[tree]), str(ROOT / "tests")])
        command = [sys.executable, str(script), *arguments]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True)

    run("pristine", "0", "of pristine")
    run("patched", "1", "of patched", "of pristine", "patched given pristine")
    run("pristine", "2", "of neither", "of patched", "pristine given patched")

    for ours, theirs in (("pristine", "patched"), ("patched", "pristine")):
        expected = torch.load(tmp_path / f"of {ours}")["outputs"]
        found = torch.load(tmp_path / f"{theirs} given {ours}")
        assert found.keys() == expected.keys()
        for net in expected:
            assert found[net].keys() == expected[net].keys()
            differ = [name for name in expected[net] if not torch.equal(found[net][name], expected[net][name])]
            assert (net, differ) == (net, [])
            assert all(value.isfinite().all() for value in expected[net].values())


# the check


def run_check(tree: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "x_transformers.xpos", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=False)


LEFT_OUT = {"cached-new", "shift", "scores-shards", "added-kv", "context-pos"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_passes_and_names_what_the_release_has_no_argument_for(dtype: str, tmp_path: Path) -> None:
    result = run_check(patched_tree(BACKPORT), tmp_path, "--max-len", "128", "--json", "--dtype", dtype)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["passed"]
    assert (found["package"]["version"], found["package"]["line"]) == (VERSION, BACKPORT.name)
    assert {"mems", "greedy", "scores-cache", "mem-kv", "range", "refusals"} < {row["key"] for row in found["results"]}
    assert {row["key"] for row in found["left_out"]} == LEFT_OUT
    assert result.stderr.splitlines()[-1].startswith(f"[{len(found['results'])}/{len(found['results'])}]")


def test_check_of_the_pristine_release(tmp_path: Path) -> None:
    result = run_check(pristine_tree(BACKPORT), tmp_path, "--max-len", "128")
    assert result.returncode == 1, result.stderr
    assert "UNPATCHED the record of the build lists no patches" in result.stdout
    assert "UNPATCHED RotaryEmbedding.forward takes no seq_len" in result.stdout
    assert re.search(rf"prefix consistency +error +\S+ +FAIL +{NAME_ERROR}", result.stdout)
    assert "left out  cached decode, new token (input_not_include_cache); shift of positions (pos)" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(ROOT) not in line) <= 100


def test_survey_says_that_it_is_about_another_release(tmp_path: Path) -> None:
    result = run_check(patched_tree(BACKPORT), tmp_path, "options")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "python -m x_transformers.xpos options: error: "
        f"the survey is about the options of x-transformers 2.x, not of {VERSION}\n"
    )
