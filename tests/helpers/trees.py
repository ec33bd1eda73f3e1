"""Helpers of the packaging tests: a copy of the project, builds of it in a process of their own, small patches."""

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
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# for modules that no wheel has; the `x_transformers` of the repository has no `__init__`, so any package goes before it
sys.path.insert(0, str(Path(__file__).parents[2]))

import hatch_build as hatch_build

provenance = hatch_build.provenance

ROOT = Path(__file__).parents[2]
LINE = Path("patches", "2.x")
BACKPORT = Path("patches", "1.27.x")
# the parts of the default line's series: three pull requests, each on top of the one before it, and the fork's own
PARTS = ("A", "B", "C", "fork")
# the tests that go upstream with each of the first three
TESTS_PATCHES = dict(zip("ABC", sorted((ROOT / LINE / "tests-for-upstream").glob("*.patch"))))
# what the series change: one file, and single lines or an argument of two more in the default line
ONLY_FILE = "x_transformers/x_transformers.py"
FILES = {
    BACKPORT: {ONLY_FILE},
    LINE: {ONLY_FILE, "x_transformers/recirculation.py", "x_transformers/autoregressive_wrapper.py"},
}

_PROJECT = ("pyproject.toml", "hatch_build.py", ".gitignore", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")
_DROPPINGS = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis", "provenance.json")
_CALL_BACKEND = "import sys, hatchling.build; print(getattr(hatchling.build, sys.argv[1])(sys.argv[2]))"


def copy_project(directory: Path) -> Path:
    """The files of the repository that a build reads."""
    for folder in ("patches", "tests", "x_transformers/xpos"):
        shutil.copytree(ROOT / folder, directory / folder, ignore=_DROPPINGS)
    for name in _PROJECT:
        shutil.copyfile(ROOT / name, directory / name)
    return directory


def package_root(project: Path, line: Path) -> Path:
    """The folder of the project that a line is built in: its own where it has a pyproject.toml there."""
    return project / line if (project / line / "pyproject.toml").is_file() else project


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without the settings of pip and git, and without the package that is tested, plus `variables`."""
    left_out = ("PIP_", "GIT_", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**environment, "PIP_CONFIG_FILE": os.devnull, **variables}


def offline(wheelhouse: Path, **variables: str) -> dict[str, str]:
    """An environment whose pip has nothing but the wheelhouse."""
    # pip splits it at spaces, of which a URI has none
    return clean_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=wheelhouse.as_uri(), **variables)


def call_backend(
    hook: str, project: Path, out: Path, environment: Mapping[str, str], before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Call `build_wheel`, `build_sdist` or `build_editable` as a front end does: in the project, in a process.

    The process calls `before` first.
    """
    out.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", _CALL_BACKEND, hook, str(out)],
        cwd=project,
        env=dict(environment),
        text=True,
        capture_output=True,
        check=False,
        preexec_fn=before,
    )


def build(
    hook: str, project: Path, out: Path, environment: Mapping[str, str], before: Callable[[], object] | None = None
) -> Path:
    """The file that a successful build makes."""
    result = call_backend(hook, project, out, environment, before)
    assert result.returncode == 0, result.stdout + result.stderr
    return out / result.stdout.splitlines()[-1]


def pristine_tree(line: Path = LINE) -> Path:
    """A folder with the unpatched pinned release and the fork's own module, to be put on sys.path."""
    return built_tree(line, ())


def series_part(part: str) -> list[str]:
    """The names of the default line's patches below the comment in `series` that begins a part."""
    names: dict[str, list[str]] = {}
    for line in (ROOT / LINE / "series").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            last = names.setdefault(line.split()[1], [])
        else:
            last.append(line)
    assert tuple(names) == PARTS
    return names[part]


def tree_up_to(last: str) -> Path:
    """The same with the parts of the default line's series up to one of them."""
    parts = PARTS[: PARTS.index(last) + 1]
    return built_tree(LINE, [name for part in parts for name in series_part(part)])


def patched_tree(line: Path = LINE) -> Path:
    """The same with the patches of the line: its package, for tests to run on."""
    return built_tree(line, hatch_build.read_series(ROOT / line))


def built_tree(line: Path, series: Sequence[str]) -> Path:
    """What the hook builds from these patches of a line; in pytest's cache until one of its inputs changes."""
    patches = {name: (ROOT / line / name).read_bytes() for name in series}
    inputs = [ROOT / "hatch_build.py", package_root(ROOT, line) / "pyproject.toml", ROOT / line / "upstream.txt"]
    inputs.append(ROOT / "README.md")  # which is part of the metadata
    inputs += sorted((ROOT / "x_transformers" / "xpos").rglob("*.py"))
    content = b"".join([*(path.name.encode() + path.read_bytes() for path in inputs), *patches.values()])
    cache = ROOT / ".pytest_cache" / "trees"
    tree = cache / f"{line.name}-{len(series)}-{provenance.sha256(content)[:16]}"
    if tree.is_dir():
        os.utime(tree)
        return tree

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        project = copy_project(Path(temporary, "project"))
        set_series(project, patches, line=line)
        wheel = build("build_wheel", package_root(project, line), Path(temporary, "wheel"), os.environ)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(temporary, "tree"))
        with contextlib.suppress(OSError):  # another run was first
            Path(temporary, "tree").rename(tree)
    for old in cache.iterdir():  # of earlier states of the checkout, and none that a run may still be using
        with contextlib.suppress(OSError):
            if old.stat().st_mtime < time.time() - 24 * 60 * 60:
                shutil.rmtree(old)
    assert tree.is_dir()
    return tree


# of who commits
IDENTITY = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a repository, with nobody's settings."""
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(repository.parent)}
    environment = clean_environment(LC_ALL="C", **settings, **IDENTITY)
    # the checkout may be somebody else's, as in a container
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=repository, env=environment, text=True, capture_output=True)


def make_repository(repository: Path, subject: str) -> None:
    """A git repository of the files in a folder, in one commit."""
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", subject]):
        assert git(repository, *command).returncode == 0


def make_patch(path: str, old: bytes | None, new: bytes | None) -> bytes:
    """A patch of one file, None meaning that it does not exist; minimal, but of the form of git format-patch."""
    diff = difflib.unified_diff(
        (old or b"").decode().splitlines(keepends=True),
        (new or b"").decode().splitlines(keepends=True),
        "/dev/null" if old is None else f"a/{path}",
        "/dev/null" if new is None else f"b/{path}",
    )
    mode = "new file mode 100644\n" if old is None else "deleted file mode 100644\n" if new is None else ""
    head = f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: A <a@example.org>\nSubject: [PATCH] Change a file\n\n"
    return f"{head}---\n\ndiff --git a/{path} b/{path}\n{mode}{''.join(diff)}".encode()


def set_series(project: Path, patches: Mapping[str, bytes], line: Path = LINE) -> None:
    """Replace the patches of the project."""
    for old in (project / line).glob("*.patch"):
        old.unlink()
    for name, content in patches.items():
        (project / line / name).write_bytes(content)
    (project / line / "series").write_text("".join(f"{name}\n" for name in patches), encoding="utf-8")


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below the directory but Python's bytecode."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def edit(path: Path, pattern: str, replacement: str) -> None:
    """Replace what the pattern matches in a file; it must match."""
    text = path.read_text(encoding="utf-8")
    new, count = re.subn(pattern, lambda _: replacement, text)
    assert count, f"{pattern} is not in {path.name}"
    path.write_text(new, encoding="utf-8")
