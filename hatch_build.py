"""Build hook: the pinned upstream release plus the patches of one line gives the package.

The repository holds no copy of upstream. A build has pip download the release that `upstream.txt` pins and check its
hash, applies the patches that `series` names with `git apply`, and includes the result. An sdist carries the patched
files with a record of their hashes, so a build from it needs neither network nor git.

Every line is built by this file, and has the fork's own module from beside it. The default line's pyproject.toml is
beside it too; another line's is in its folder of patches, which makes that a package root of its own. An sdist has the
same layout for every line: pyproject.toml, this file, the package and `patches/<line>/`.

The functions above the hook know nothing of hatchling. They also serve the tests and `patches/try_release.py`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.utils import parse_wheel_filename

CHECKOUT = Path(os.path.abspath(__file__)).parent

if TYPE_CHECKING:
    from x_transformers.xpos import build_record

    provenance = build_record
else:
    # By its path: importing the package would import torch, and is what this file is about to build.
    _spec = importlib.util.spec_from_file_location(
        "_x_transformers_provenance", CHECKOUT / "x_transformers" / "xpos" / "build_record.py"
    )
    provenance = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = provenance  # dataclasses look their module up
    _spec.loader.exec_module(provenance)

PACKAGE = provenance.PACKAGE
# the fork's own module: no patch may change it, and upstream must not have one of that name
OWN_MODULE = f"{PACKAGE}/xpos"
# upstream's licence travels with the files it is about
LICENSE_PATH = f"{PACKAGE}/LICENSE"

# pip reads its options from the environment as well. Those that say where packages come from and how to get there
# (index, proxy, certificates, wheelhouse) are the user's, and are kept; these say what to install, or for which
# interpreter, and were meant for the installation that this build is part of.
PIP_WHAT_TO_INSTALL = {
    *("PIP_ABI", "PIP_BUILD_CONSTRAINT", "PIP_GROUP", "PIP_IMPLEMENTATION", "PIP_PLATFORM", "PIP_PYTHON"),
    *("PIP_PYTHON_VERSION", "PIP_REQUIREMENT", "PIP_REQUIREMENTS_FROM_SCRIPT"),
}

NO_EDITABLE_INSTALL = (
    "there is no editable install: run `pip install .`, which takes seconds. Patches are edited in a git repository of "
    "the release, as docs/contributing.md says, and tested there with `pytest --package=DIR`."
)


class BuildError(Exception):
    """A build that cannot go on; the message says what failed and the ways out."""


class PatchError(BuildError):
    """A patch that does not apply; the message names its hunks that do not."""


class Release(NamedTuple):
    """An upstream release: its package's files and its licence, by path (`x_transformers/attend.py`)."""

    name: str
    version: str
    sha256: str
    files: dict[str, bytes]

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


class Patch(NamedTuple):
    name: str
    content: bytes


# the upstream release


def fetch_release(pin: Path) -> Release:
    """The release that a line's `upstream.txt` pins: pip downloads it and checks its hash."""
    environment = {name: value for name, value in os.environ.items() if name not in PIP_WHAT_TO_INSTALL}
    # Set rather than dropped, to win over pip.conf too: the user may constrain this very distribution to the fork.
    environment.update(PIP_CONSTRAINT=os.devnull, PIP_REQUIRE_VIRTUALENV="0")
    with tempfile.TemporaryDirectory(prefix="x-transformers-") as directory:
        command = [sys.executable, "-m", "pip", "-qq", "--no-input", "--disable-pip-version-check", "download"]
        command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "-r", str(pin), "-d", directory]
        result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        wheels = list(Path(directory).glob("*.whl"))
        if result.returncode == 0 and len(wheels) == 1:
            return load_release(wheels[0])

    said = (result.stdout + result.stderr).decode("utf-8", "replace").strip()
    if "No module named pip" in said:
        raise BuildError(
            f"{sys.executable} has no pip, and the build has pip download the upstream release: "
            "install pip there, or build with isolation (without --no-build-isolation)"
        )
    raise BuildError(
        f"pip could not download the one upstream release that {'/'.join(pin.parts[-3:])} must pin. pip says:\n"
        f"{_indent(said.splitlines() or [f'{len(wheels)} files were downloaded'])}\n"
        "Ways out: make an index or a wheelhouse that has it reachable through pip's environment variables "
        "(PIP_INDEX_URL, PIP_PROXY, PIP_FIND_LINKS, ...) or pip.conf, which this download obeys, unlike options on "
        "the command line; or install from an sdist or a wheel of this package, which carry the release."
    )


def load_release(wheel: Path) -> Release:
    """Read a release from its wheel, whichever version it is."""
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for path in (path for path in archive.namelist() if not path.endswith("/")):
            folder, _, rest = path.partition("/")
            if not folder.endswith(".dist-info"):
                files[path] = archive.read(path)
            elif rest.rpartition("/")[2].upper().startswith("LICEN"):
                files[LICENSE_PATH] = archive.read(path)
    if LICENSE_PATH not in files:
        raise BuildError(f"{wheel.name} holds no licence: without one its code cannot be passed on")
    if misplaced(files):
        raise BuildError(f"{wheel.name} holds {', '.join(misplaced(files))}, which this build has no place for")
    name, version, *_ = parse_wheel_filename(wheel.name)
    return Release(name, str(version), provenance.sha256(wheel.read_bytes()), files)


def misplaced(files: Iterable[str]) -> list[str]:
    """Those of the paths that are not upstream's: outside of its package, or of the fork's own module."""
    own = (f"{OWN_MODULE}/", f"{OWN_MODULE}.py")
    return [path for path in files if not path.startswith(f"{PACKAGE}/") or path.startswith(own)]


# the patches


def read_series(line_dir: Path) -> tuple[str, ...]:
    """The names of a line's patches in order, from its `series` (quilt's format); each file is there."""
    lines = (line_dir / "series").read_text(encoding="utf-8").splitlines()
    names = tuple(filter(None, (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)))
    missing = [name for name in names if not (line_dir / name).is_file()]
    if missing:
        raise BuildError(f"patches/{line_dir.name}/series names {missing[0]}, which does not exist there")
    return names


def read_patches(line_dir: Path) -> list[Patch]:
    """The patches of a line in the order of its series."""
    return [Patch(name, (line_dir / name).read_bytes()) for name in read_series(line_dir)]


def apply_series(
    files: Mapping[str, bytes], patches: Iterable[Patch], release: object = "the release"
) -> dict[str, bytes]:
    """`files` with the patches applied in order, exactly: every line of context must match where the patch says.

    Raises PatchError at the first patch that does not apply.
    """
    files = dict(files)
    with tempfile.TemporaryDirectory(prefix="x-transformers-") as directory:
        tree = Path(directory, "tree")
        write_files(files, tree)
        for patch in patches:
            status, said = git_apply(patch.content, tree, "--reject", "--verbose")
            # a hunk that matches at other lines than it says is not an error to git
            faults = re.findall(r"^(?:error: .*[^:\n]|Rejected hunk .*|Hunk .* succeeded at .*)$", said, re.MULTILINE)
            before, files = files, _read_files(tree)
            faults += [f"{path} is not a file of upstream's package" for path in misplaced(files)]
            if status == 0 and files == before:
                faults.append("it changes nothing")
            if status != 0 or faults:
                raise PatchError(
                    f"{patch.name} does not apply to {release} as it is:\n{_indent(faults)}\n"
                    "Refresh the patch: docs/contributing.md says how."
                )
    return files


def git_apply(patch: bytes, tree: Path, *options: str) -> tuple[int, str]:
    """The exit status of `git apply` in the tree, and what it says on both outputs."""
    # Only the patch and the files may decide the result. In a repository `git apply` skips files outside of it
    # without a word, and the user's configuration may change whitespace or line endings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    home = str(tree.parent)
    environment.update(GIT_CONFIG_NOSYSTEM="1", GIT_CONFIG_GLOBAL=os.devnull, GIT_ATTR_NOSYSTEM="1")
    environment.update(GIT_CEILING_DIRECTORIES=home, HOME=home, XDG_CONFIG_HOME=home, LC_ALL="C", LANGUAGE="")
    command = ["git", "apply", "--whitespace=nowarn", *options, "-"]
    try:
        result = subprocess.run(command, cwd=tree, env=environment, input=patch, capture_output=True, check=False)
    except FileNotFoundError:
        raise BuildError(
            "git is not on PATH, and the build applies the patches with `git apply`: "
            "install git, or install from an sdist or a wheel of this package, which carry the patched files"
        ) from None
    return result.returncode, (result.stdout + result.stderr).decode("utf-8", "replace")


def write_files(files: Mapping[str, bytes], directory: Path) -> dict[str, Path]:
    """Write them below the directory; gives where each one is."""
    for path, content in files.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return {path: directory / path for path in files}


def _read_files(directory: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def _indent(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


# the hook


class PatchedReleaseHook(BuildHookInterface[Any]):
    """Runs the above for hatchling. `line` in its configuration is the folder of patches, from this file's folder."""

    _made: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            if version == "editable":
                raise BuildError(NO_EDITABLE_INSTALL)
            included = self._included()
        except (BuildError, provenance.FormatError, OSError) as error:
            # One message and a non-zero exit: an exception would bury it under hatchling's frames.
            self.app.abort(f"\nerror: {error}\n")
        # hatchling's own entries, but one for what is given here: an archive would have both
        kept = {source: path for source, path in build_data["force_include"].items() if path not in included}
        build_data["force_include"] = {**kept, **{str(source): path for path, source in included.items()}}
        if self.target_name == "wheel":
            # as upstream's: where its metadata has no Requires-Python, hatchling would add Python 2
            build_data["tag"] = "py3-none-any"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._made is not None:
            self._made.cleanup()

    def _included(self) -> dict[str, Path]:
        """The files to include by their path: the package and, in an sdist, what a build from it needs."""
        root, line = Path(self.root), self.config.get("line")
        if not isinstance(line, str) or not (CHECKOUT / line).is_dir():
            raise BuildError(f"pyproject.toml: the custom hook's `line` must name a folder of patches, not {line!r}")
        line_dir = CHECKOUT / line

        if (root / "PKG-INFO").is_file():
            # an sdist, which carries what was built
            carried = provenance.read_record(root / PACKAGE)
            if carried is None:
                raise BuildError(f"this sdist lacks {provenance.RECORD_PATH}: unpack it afresh")
            included = {path: root / path for path in (*carried.files, provenance.RECORD_PATH)}
        else:
            patches = read_patches(line_dir)
            release = fetch_release(line_dir / "upstream.txt")
            files = apply_series(release.files, patches, release)
            record = provenance.Record(
                version=self.metadata.version,
                upstream_name=release.name,
                upstream_version=release.version,
                upstream_sha256=release.sha256,
                line=line_dir.name,
                patches=tuple(provenance.AppliedPatch(name, provenance.sha256(patch)) for name, patch in patches),
                files={path: provenance.sha256(content) for path, content in sorted(files.items())},
            )
            files[provenance.RECORD_PATH] = record.to_json().encode()
            if self.target_name == "sdist" and root != CHECKOUT:
                # in an sdist this file is beside it
                text = (root / "pyproject.toml").read_text(encoding="utf-8")
                files["pyproject.toml"] = text.replace('"../../hatch_build.py"', '"hatch_build.py"').encode()
            self._made = tempfile.TemporaryDirectory(prefix="x-transformers-")
            included = write_files(files, Path(self._made.name))

        beside = sorted((CHECKOUT / OWN_MODULE).rglob("*.py"))
        if self.target_name == "sdist":
            names = ("upstream.txt", "series", *read_series(line_dir))
            beside += [CHECKOUT / "hatch_build.py", *(line_dir / name for name in names)]
        return {**included, **{path.relative_to(CHECKOUT).as_posix(): path for path in beside}}
