"""The repository as tests use it: copies and builds of it, trees to import the package from, git and patches."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# for modules that no wheel has; the `x_transformers` of the repository has no `__init__`, so any package goes before it
sys.path.insert(0, str(Path(__file__).parents[2]))

import hatch_build as hatch_build

provenance = hatch_build.provenance

ROOT = hatch_build.CHECKOUT
LINE, BACKPORT = Path("patches", "2.x"), Path("patches", "1.27.x")
# the upstream release of each, as pip names it
PINNED = {line: (ROOT / line / "upstream.txt").read_text(encoding="utf-8").split()[0] for line in (LINE, BACKPORT)}
# what the series change: one file, and single lines or an argument of two more in the default line
ONLY_FILE = "x_transformers/x_transformers.py"
MORE_FILES = ("x_transformers/recirculation.py", "x_transformers/autoregressive_wrapper.py")
FILES = {BACKPORT: {ONLY_FILE}, LINE: {ONLY_FILE, *MORE_FILES}}

# the parts of the default line's series, each below a comment in it: three pull requests (A, B, C) and the fork's own
_, *_found = re.split(r"^# (\w+).*\n", (ROOT / LINE / "series").read_text(encoding="utf-8"), flags=re.MULTILINE)
PARTS: dict[str, list[str]] = {part: names.split() for part, names in zip(_found[::2], _found[1::2])}
# the tests that go upstream with each pull request
TESTS_PATCHES = dict(zip("ABC", sorted((ROOT / LINE / "tests-for-upstream").glob("*.patch"))))


def output(*command: object, **process: Any) -> str:
    """What a process prints that succeeds."""
    result = subprocess.run([*map(str, command)], text=True, capture_output=True, **process)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# builds


def copy_project(directory: Path) -> Path:
    """The files of the repository that a build reads."""
    droppings = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis", "provenance.json")
    for folder in ("patches", "tests", "x_transformers/xpos"):
        shutil.copytree(ROOT / folder, directory / folder, ignore=droppings)
    names = ("pyproject.toml", "hatch_build.py", "constraints.txt", ".gitignore", "LICENSE")
    for path in (*ROOT.glob("*.md"), *map(ROOT.joinpath, names)):
        shutil.copyfile(path, directory / path.name)
    return directory


def package_root(project: Path, line: Path) -> Path:
    """The folder of the project that a line is built in: its own where it has a pyproject.toml there."""
    return project / line if (project / line / "pyproject.toml").is_file() else project


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without the settings of pip and git, and without the package that is tested, plus `variables`."""
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(("PIP_", "GIT_", "PYTHONPATH"))}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, **variables}


def backend(hook: str, out: Path) -> list[str]:
    """The command that calls `build_wheel`, `build_sdist` or `build_editable` as a front end does: in the project."""
    call = "import sys, hatchling.build; print(getattr(hatchling.build, sys.argv[1])(sys.argv[2]))"
    out.mkdir(parents=True, exist_ok=True)
    return [sys.executable, "-c", call, hook, str(out)]


def build(hook: str, project: Path, out: Path, environment: Mapping[str, str], **process: Any) -> Path:
    """The file that a successful build makes."""
    return out / output(*backend(hook, out), cwd=project, env=environment, **process).splitlines()[-1]


# trees: folders to be put on sys.path, with the package and the fork's own module


def pristine_tree(line: Path = LINE) -> Path:
    """The unpatched pinned release."""
    return built_tree(line, ())


def patched_tree(line: Path = LINE) -> Path:
    """The package of a line, for tests to run on."""
    return built_tree(line, hatch_build.read_series(ROOT / line))


def tree_up_to(last: str) -> Path:
    """The default line's series up to the end of one of its parts."""
    return built_tree(LINE, [name for part in PARTS if part <= last for name in PARTS[part]])


def built_tree(line: Path, series: Sequence[str]) -> Path:
    """What the hook builds from these patches of a line; in pytest's cache until one of its inputs changes."""
    patches = {name: (ROOT / line / name).read_bytes() for name in series}
    # README is part of the metadata
    inputs = [ROOT / name for name in ("hatch_build.py", "README.md", line / "upstream.txt")]
    inputs += [package_root(ROOT, line) / "pyproject.toml", *sorted((ROOT / "x_transformers" / "xpos").rglob("*.py"))]
    content = b"".join([*(path.name.encode() + path.read_bytes() for path in inputs), *patches.values()])
    cache = ROOT / ".pytest_cache" / "trees"
    tree = cache / f"{line.name}-{len(series)}-{provenance.sha256(content)[:16]}"
    if tree.is_dir():
        os.utime(tree)
        return tree

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        project, new = copy_project(Path(directory, "project")), Path(directory, "tree")
        set_series(project, patches, line)
        wheel = build("build_wheel", package_root(project, line), Path(directory, "wheel"), os.environ)
        shutil.unpack_archive(wheel, new, "zip")
        with contextlib.suppress(OSError):  # another run was first
            new.rename(tree)
    for old in cache.iterdir():  # of earlier states of the checkout, and none that a run may still be using
        with contextlib.suppress(OSError):
            if old.stat().st_mtime < time.time() - 24 * 60 * 60:
                shutil.rmtree(old)
    assert tree.is_dir()
    return tree


# files, patches and git


def release_files(line: Path = LINE) -> dict[str, bytes]:
    """The modules of the unpatched release, by path."""
    modules = (pristine_tree(line) / "x_transformers").glob("*.py")
    return {f"x_transformers/{path.name}": path.read_bytes() for path in modules}


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below the directory but Python's bytecode."""
    paths = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def make_patch(path: str, old: bytes, new: bytes) -> bytes:
    """A patch of one file, which does not exist where it is empty."""
    before, after = (content.decode().splitlines(keepends=True) for content in (old, new))
    names = [f"{side}/{path}" if content else "/dev/null" for side, content in zip("ab", (old, new))]
    return "".join(difflib.unified_diff(before, after, names[0], names[1])).encode()


def set_series(project: Path, patches: Mapping[str, bytes], line: Path = LINE) -> None:
    """Replace the patches of the project."""
    for old in (project / line).glob("*.patch"):
        old.unlink()
    hatch_build.write_files(patches, project / line)
    (project / line / "series").write_text("".join(f"{name}\n" for name in patches), encoding="utf-8")


# of who commits
IDENTITY = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a repository, with nobody's settings."""
    settings = dict(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1", HOME=str(repository.parent), LC_ALL="C")
    # the checkout may be somebody else's, as in a container
    command, environment = ["git", "-c", "safe.directory=*", *arguments], clean_environment(**settings, **IDENTITY)
    return subprocess.run(command, cwd=repository, env=environment, text=True, capture_output=True)


def make_repository(repository: Path, subject: str) -> None:
    """A git repository of the files in a folder, in one commit."""
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", subject]):
        assert git(repository, *command).returncode == 0
