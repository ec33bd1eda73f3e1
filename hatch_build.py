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

import email
import email.policy
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

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
    "the release, as patches/README.md says, and tested there with `pytest --package=DIR`."
)


class BuildError(Exception):
    """A build that cannot go on; the message says what failed and the ways out."""


class PatchError(BuildError):
    """A patch that does not apply. `hunks` names each one that fails, as in `x_transformers/attend.py: hunk 2`."""

    def __init__(self, message: str, patch: str, hunks: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.patch = patch
        self.hunks = tuple(hunks)


class Release(NamedTuple):
    """An upstream release: its package's files and licence by path (`x_transformers/attend.py`), and its METADATA."""

    name: str
    version: str
    sha256: str
    files: dict[str, bytes]
    metadata: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


class Patch(NamedTuple):
    name: str
    content: bytes

    @property
    def subject(self) -> str:
        """The subject of a `git format-patch` file without its [PATCH] tag; empty if it has none."""
        subject = email.message_from_bytes(self.content, policy=email.policy.default)["Subject"]
        return re.sub(r"^\[PATCH[^]]*\]\s*", "", " ".join(str(subject or "").split()))


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
        f"pip could not download the one upstream release that {_short(pin)} must pin. pip says:\n"
        f"{_indent(said.splitlines() or [f'{len(wheels)} files were downloaded'])}\n"
        "Ways out: make an index or a wheelhouse that has it reachable through pip's environment variables "
        "(PIP_INDEX_URL, PIP_PROXY, PIP_FIND_LINKS, ...) or pip.conf, which this download obeys, unlike options on "
        "the command line; or install from an sdist or a wheel of this package, which carry the release."
    )


def load_release(wheel: Path) -> Release:
    """Read a release from its wheel, whichever version it is."""
    files, metadata = {}, ""
    with zipfile.ZipFile(wheel) as archive:
        for name in (name for name in archive.namelist() if not name.endswith("/")):
            folder, _, rest = name.partition("/")
            if folder == PACKAGE and not _is_own(name):
                files[name] = archive.read(name)
            elif not folder.endswith(".dist-info"):
                raise BuildError(f"{wheel.name} holds {name}, which this build has no place for")
            elif rest == "METADATA":
                metadata = archive.read(name).decode("utf-8")
            elif rest.rpartition("/")[2].upper().startswith("LICEN"):
                files[LICENSE_PATH] = archive.read(name)
    if LICENSE_PATH not in files:
        raise BuildError(f"{wheel.name} holds no licence: without one its code cannot be passed on")
    headers = HeaderParser().parsestr(metadata)
    return Release(headers["Name"], headers["Version"], provenance.sha256(wheel.read_bytes()), files, metadata)


# the patches


def read_series(line_dir: Path) -> tuple[str, ...]:
    """The names of a line's patches in order, from its `series` (quilt's format); each file is there."""
    names: list[str] = []
    for number, line in enumerate((line_dir / "series").read_text(encoding="utf-8").splitlines(), 1):
        name, *options = re.sub(r"(^|\s+)#.*", "", line).split() or [""]
        where = f"{_short(line_dir / 'series')}, line {number}"
        # quilt allows options after the name; all but its default would change what the patch does
        if options not in ([], ["-p1"]):
            raise BuildError(f"{where}: one file name a line, not {line.strip()!r}")
        if name in names:
            raise BuildError(f"{where}: {name} is named twice")
        if "/" in name or (name and not (line_dir / name).is_file()):
            raise BuildError(f"{where}: {_short(line_dir / name)} does not exist")
        names += [name] if name else []
    return tuple(names)


def read_patches(line_dir: Path) -> list[Patch]:
    """The patches of a line in the order of its series."""
    return [Patch(name, (line_dir / name).read_bytes()) for name in read_series(line_dir)]


def apply_series(
    files: Mapping[str, bytes],
    patches: Iterable[Patch],
    *,
    release: object = "the release",
    allow_offsets: bool = False,
) -> dict[str, bytes]:
    """`files` with the patches applied in order, exactly: every line of context must match where the patch says.

    `allow_offsets` accepts hunks that match elsewhere in the file, for trying the series on another release.
    Raises PatchError at the first patch that does not apply.
    """
    files = dict(files)
    refresh = "Refresh the patch: patches/README.md says how."
    with tempfile.TemporaryDirectory(prefix="x-transformers-") as directory:
        tree = Path(directory, "tree")
        write_files(files, tree)
        for patch in patches:
            status, said = git_apply(patch.content, tree, "--apply", "--summary", "--reject", "--verbose")
            if status != 0:
                failed = re.findall(r"^error: patch failed: (.*):(\d+)$", said, re.MULTILINE)
                numbers = re.findall(r"^Rejected hunk #(\d+)\.$", said, re.MULTILINE)
                hunks = [f"{path}: hunk {n}, at line {line}" for (path, line), n in zip(failed, numbers)]
                reasons = _indent(hunks or re.findall(r"^error: (.*)$", said, re.MULTILINE))
                raise PatchError(f"{patch.name} does not apply to {release}:\n{reasons}\n{refresh}", patch.name, hunks)
            moved = re.findall(r"^Hunk #\d+ succeeded at .*\(offset .*$", said, re.MULTILINE)
            if moved and not allow_offsets:
                message = f"{patch.name} applies to {release} only at other lines than it says:"
                raise PatchError(f"{message}\n{_indent(moved)}\n{refresh}", patch.name)
            before, files = files, _read_files(tree)
            changed = sorted(path for path in {*before, *files} if before.get(path) != files.get(path))
            # files in a wheel have no modes: a change of one would be in the record and do nothing
            refused = re.findall(r"^ (mode change .*|create mode (?!100644).*)$", said, re.MULTILINE)
            refused += [f"change of {path}" for path in changed if not path.startswith(f"{PACKAGE}/") or _is_own(path)]
            if refused or not changed:
                allowed = f"a patch may add, edit, rename and remove upstream's files in {PACKAGE}/, not their modes"
                raise PatchError(f"{patch.name}: {', '.join(refused) or 'no change'}: {allowed}", patch.name)
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


def _is_own(path: str) -> bool:
    return path == f"{OWN_MODULE}.py" or path.startswith(f"{OWN_MODULE}/")


def _short(path: Path) -> str:
    """A path as a reader of the repository knows it, without where the checkout happens to lie."""
    return "/".join(path.parts[-3:])


def _indent(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


# the metadata and the record


def metadata_differences(upstream: str, own: str) -> list[str]:
    """What must change in pyproject.toml to follow upstream, one message each. Both are texts of METADATA."""
    theirs, ours = HeaderParser().parsestr(upstream), HeaderParser().parsestr(own)
    messages = []

    version = theirs["Version"]
    if not re.fullmatch(rf"{re.escape(version)}\+xpos\.[1-9]\d*", ours["Version"]):
        messages.append(f'version is "{ours["Version"]}", write "{version}+xpos.1", or a later +xpos.<n>')
    python, own_python = theirs["Requires-Python"] or "", ours["Requires-Python"] or ""
    if SpecifierSet(python) != SpecifierSet(own_python):
        advice = f'write "{python}"' if python else "and upstream has none: remove it"
        messages.append(f'requires-python is "{own_python}", {advice}')

    required, own_required = (
        {_normalized(line) for line in metadata.get_all("Requires-Dist", [])} for metadata in (theirs, ours)
    )
    messages += [f"upstream's requirement is missing: {line}" for line in sorted(required - own_required)]
    # the fork may add extras
    added = [line for line in sorted(own_required - required) if "extra ==" not in line]
    return [*messages, *(f"a requirement is not upstream's: {line}" for line in added)]


def _normalized(line: str) -> str:
    requirement = Requirement(line)
    requirement.name = canonicalize_name(requirement.name)
    return str(requirement)


def make_record(
    version: str, line: str, release: Release, patches: Iterable[Patch], files: Mapping[str, bytes]
) -> provenance.Record:
    return provenance.Record(
        version=version,
        upstream_name=release.name,
        upstream_version=release.version,
        upstream_sha256=release.sha256,
        line=line,
        patches=tuple(
            provenance.AppliedPatch(patch.name, provenance.sha256(patch.content), patch.subject) for patch in patches
        ),
        files={path: provenance.sha256(content) for path, content in sorted(files.items())},
    )


def verify_carried(root: Path, line_dir: Path, version: str) -> provenance.Record:
    """Check the patched files that an unpacked sdist carries, and its patches, against its record."""
    record = provenance.read_record(root / PACKAGE)
    if record is None:
        raise BuildError(f"this sdist lacks {provenance.RECORD_PATH}: get a complete one, or build from a checkout")
    problems = [
        f"{path} {'was modified' if (root / path).exists() else 'is missing'}"
        for path in provenance.modified_files(root / PACKAGE)
    ]
    modules = sorted(path.relative_to(root).as_posix() for path in (root / PACKAGE).rglob("*.py"))
    problems += [f"{path} was added" for path in modules if path not in record.files and not _is_own(path)]
    patches = [(patch.name, provenance.sha256(patch.content)) for patch in read_patches(line_dir)]
    if patches != [(patch.name, patch.sha256) for patch in record.patches]:
        problems.append(f"the patches in patches/{line_dir.name}/ are not those of the record")
    pin = (line_dir / "upstream.txt").read_text(encoding="utf-8")
    if f"{record.upstream_name}=={record.upstream_version} " not in pin or record.upstream_sha256 not in pin:
        problems.append(f"patches/{line_dir.name}/upstream.txt pins another release than the record's")
    if record.version != version:
        problems.append(f"pyproject.toml has version {version}, the record {record.version}")
    if problems:
        raise BuildError(
            f"this sdist does not match its own record, {provenance.RECORD_PATH}:\n{_indent(problems)}\n"
            "Unpack the sdist afresh to build what was published; make changes in a checkout, as a patch."
        )
    return record


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
            record = verify_carried(root, line_dir, self.metadata.version)
            included = {path: root / path for path in (*record.files, provenance.RECORD_PATH)}
        else:
            patches = read_patches(line_dir)
            release = fetch_release(line_dir / "upstream.txt")
            metadata = self.build_config.core_metadata_constructor(self.metadata)
            differences = metadata_differences(release.metadata, metadata)
            if differences:
                raise BuildError(f"pyproject.toml does not follow {release}:\n{_indent(differences)}")
            files = apply_series(release.files, patches, release=release)
            record = make_record(self.metadata.version, line_dir.name, release, patches, files)
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
