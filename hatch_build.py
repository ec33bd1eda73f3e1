"""Build hook: the pinned upstream release plus the patches of one line gives the package.

The repository holds no copy of upstream. A build has pip download the release that `upstream.txt` pins, checks its
hash, applies the patches that `series` names with `git apply`, and includes the result. An sdist carries the patched
files with a record of their hashes, so a build from it needs neither network nor git.

Every line is built by this file, and has the fork's own module from beside it. The default line's pyproject.toml is
beside it too; another line's is in its folder of patches, which makes that a package root of its own. An sdist has the
same layout for every line: pyproject.toml, this file, the package and `patches/<line>/`.

The functions above the hook do the work on plain values and know nothing of hatchling. Besides the build they serve
the tests and whoever wants the pristine release (`fetch_release`) or the series on another one (`load_release`,
`apply_series`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

CHECKOUT = Path(os.path.abspath(__file__)).parent

if TYPE_CHECKING:
    from x_transformers.xpos import provenance as provenance
else:
    # By its path: importing the package would import torch, and is what this file is about to build.
    _spec = importlib.util.spec_from_file_location(
        "_x_transformers_provenance", CHECKOUT / "x_transformers" / "xpos" / "provenance.py"
    )
    provenance = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = provenance  # dataclasses look their module up
    _spec.loader.exec_module(provenance)

PACKAGE = provenance.PACKAGE
# What may be patched, and what upstream must leave free: the fork's own module.
OWN_MODULE = f"{PACKAGE}/xpos"
# Upstream's licence travels with the files it is about.
LICENSE_PATH = f"{PACKAGE}/LICENSE"

# pip reads each of its options from the environment as well. Those that say where packages come from and how to get
# there (index, proxy, certificates, wheelhouse) are the user's; these say what to install, or for which interpreter,
# and were meant for the installation that this build is part of.
_PIP_WHAT_TO_INSTALL = (
    "PIP_ABI",
    "PIP_BUILD_CONSTRAINT",
    "PIP_GROUP",
    "PIP_IMPLEMENTATION",
    "PIP_PLATFORM",
    "PIP_PYTHON",
    "PIP_PYTHON_VERSION",
    "PIP_REQUIREMENT",
    "PIP_REQUIREMENTS_FROM_SCRIPT",
)


class BuildError(Exception):
    """A build that cannot go on; the message says what failed and the ways out."""


class PatchError(BuildError):
    """A patch that does not apply. `hunks` holds the file, number and header of each one that fails."""

    def __init__(self, message: str, patch: str, hunks: Sequence[Hunk] = ()) -> None:
        super().__init__(message)
        self.patch = patch
        self.hunks = tuple(hunks)


class Hunk(NamedTuple):
    path: str
    number: int
    header: str

    def __str__(self) -> str:
        return f"{self.path}: hunk {self.number}, {self.header}".rstrip(", ")


class Release(NamedTuple):
    """An upstream release: its package's files and licence by path (`x_transformers/attend.py`), and its METADATA."""

    name: str
    version: str
    sha256: str
    files: dict[str, bytes]
    metadata: str


class Patch(NamedTuple):
    name: str
    content: bytes


# the upstream release


def fetch_release(pin: provenance.Pin) -> Release:
    """Download the pinned release with pip, so that the user's index, proxy or wheelhouse is used, and read it."""
    with tempfile.TemporaryDirectory(prefix="x-transformers-") as directory:
        wheel = _download(pin, Path(directory))
        release = load_release(wheel)
    if release.sha256 not in pin.hashes:
        raise BuildError(
            f"{wheel.name} has sha256 {release.sha256}, and {pin} is pinned to {' or '.join(pin.hashes)}: "
            "the file is not the one that was reviewed, do not use it"
        )
    return release


def load_release(wheel: Path) -> Release:
    """Read a release from its wheel, whichever version it is."""
    content = wheel.read_bytes()
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    except (zipfile.BadZipFile, OSError) as error:
        raise BuildError(f"{wheel.name} is not a wheel: {error}") from None

    files, metadata = {}, b""
    for name, data in entries.items():
        path = PurePosixPath(name)
        if ".." in path.parts or path.is_absolute():
            raise BuildError(f"{wheel.name} holds a path outside of itself: {name}")
        if path.parts[0] == PACKAGE:
            files[name] = data
        elif not path.parts[0].endswith(".dist-info"):
            raise BuildError(f"{wheel.name} holds {name}: only {PACKAGE}/ was expected, include it in the build first")
        elif path.name == "METADATA":
            metadata = data
        elif path.name.upper().startswith("LICEN"):
            files[LICENSE_PATH] = data
    taken = [name for name in files if _is_own(name)]
    if taken:
        raise BuildError(f"{wheel.name} has a module of its own where this fork's is: {', '.join(taken)}")

    if LICENSE_PATH not in files:
        raise BuildError(f"{wheel.name} holds no licence: without one its code cannot be passed on")

    text = metadata.decode("utf-8")
    headers = HeaderParser().parsestr(text)
    return Release(headers["Name"], headers["Version"], provenance.sha256(content), files, text)


def _download(pin: provenance.Pin, directory: Path) -> Path:
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{pin} {' '.join(f'--hash=sha256:{digest}' for digest in pin.hashes)}\n", encoding="utf-8")
    wheels = directory / "wheels"

    environment = {name: value for name, value in os.environ.items() if name not in _PIP_WHAT_TO_INSTALL}
    # Set rather than dropped, to win over pip.conf too: the user may constrain this very distribution to the fork.
    # Not a file of ours: pip splits the variable at spaces, and the temporary directory may have some.
    environment["PIP_CONSTRAINT"] = os.devnull
    environment["PIP_REQUIRE_VIRTUALENV"] = "0"
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--progress-bar=off"]
    command += ["-r", str(requirements), "-d", str(wheels)]
    result = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = result.stdout.decode("utf-8", "replace").replace(str(requirements), "the pin")
    found = sorted(wheels.glob("*.whl")) if result.returncode == 0 else []
    if len(found) == 1:
        return found[0]

    if "No module named pip" in output:
        raise BuildError(
            f"{sys.executable} has no pip, and the build has pip download the upstream release: "
            "install pip there, or build with isolation (without --no-build-isolation)"
        )
    raise BuildError(
        f"pip could not download {pin}, the upstream release that this package is made from. pip says:\n"
        f"{_indent(_pip_errors(output))}\n"
        "Ways out: make an index or a wheelhouse that has it reachable through pip's environment variables "
        "(PIP_INDEX_URL, PIP_PROXY, PIP_FIND_LINKS, ...) or pip.conf, which this download obeys, unlike options on "
        "the command line; or install from an sdist or a wheel of this package, which carry the release."
    )


def _pip_errors(output: str) -> str:
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.lstrip().startswith("ERROR")), max(len(lines) - 5, 0))
    return "\n".join(lines[first : first + 12]) or "nothing"


# the patches


def read_patches(line_dir: Path) -> list[Patch]:
    """The patches of a line in the order of its series."""
    return [Patch(name, (line_dir / name).read_bytes()) for name in provenance.read_series(line_dir)]


def apply_series(
    files: Mapping[str, bytes], patches: Iterable[Patch], *, release: str = "the release", allow_offsets: bool = False
) -> dict[str, bytes]:
    """`files` with the patches applied in order, exactly: every line of context must match where the patch says.

    `allow_offsets` accepts hunks that match elsewhere in the file, for trying the series on another release.
    Raises PatchError at the first patch that does not apply.
    """
    files = dict(files)
    with tempfile.TemporaryDirectory(prefix="x-transformers-") as directory:
        tree = Path(directory) / "tree"
        write_files(files, tree)
        for patch in patches:
            named = _patched_paths(patch, tree)
            output = _git_apply(patch, tree)
            if output.returncode != 0:
                raise _does_not_apply(patch, tree, output, release)
            moved = _moved_hunks(output.stderr)
            if moved and not allow_offsets:
                raise PatchError(
                    f"{patch.name} applies to {release} only at other lines than it says:\n{_indent(moved)}\n"
                    "Refresh the patch: patches/README.md says how.",
                    patch.name,
                )
            before, files = files, _read_files(tree)
            changed = {path for path in {*before, *files} if before.get(path) != files.get(path)}
            missed = sorted(named - changed)
            if missed:
                raise PatchError(f"{patch.name} left unchanged what it patches: {', '.join(missed)}", patch.name)
            outside = sorted(path for path in changed if not _is_patchable(path))
            if outside:
                raise PatchError(f"{patch.name} changes files that no patch may: {', '.join(outside)}", patch.name)
    return files


def write_files(files: Mapping[str, bytes], directory: Path) -> None:
    for path, content in files.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _read_files(directory: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def _is_patchable(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return parts[0] == PACKAGE and ".." not in parts and not _is_own(path)


def _is_own(path: str) -> bool:
    return path == f"{OWN_MODULE}.py" or path.startswith(f"{OWN_MODULE}/")


class _Output(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def _git_apply(patch: Patch, tree: Path, *options: str) -> _Output:
    # Only the patch and the files may decide the result. In a repository `git apply` skips files outside of it
    # without a word, and the user's configuration may change whitespace or line endings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    home = str(tree.parent)
    environment.update(
        GIT_CEILING_DIRECTORIES=home,
        GIT_CONFIG_NOSYSTEM="1",
        GIT_CONFIG_GLOBAL=os.devnull,
        GIT_ATTR_NOSYSTEM="1",
        HOME=home,
        XDG_CONFIG_HOME=home,
        LC_ALL="C",
        LANGUAGE="",
    )
    options = options or ("--verbose",)
    command = ["git", "apply", "--whitespace=nowarn", *options, "-"]
    try:
        result = subprocess.run(
            command, cwd=tree, env=environment, input=patch.content, capture_output=True, check=False
        )
    except FileNotFoundError:
        raise BuildError(
            "git is not on PATH, and the build applies the patches with `git apply`: "
            "install git, or install from an sdist or a wheel of this package, which carry the patched files"
        ) from None
    return _Output(
        result.returncode, result.stdout.decode("utf-8", "replace"), result.stderr.decode("utf-8", "replace")
    )


def _patched_paths(patch: Patch, tree: Path) -> set[str]:
    output = _git_apply(patch, tree, "--numstat", "-z")
    paths = {entry.split("\t", 2)[2] for entry in output.stdout.split("\0") if entry.count("\t") >= 2}
    if output.returncode != 0 or not paths:
        raise PatchError(
            f"{patch.name} is not a patch that git can read:\n{_indent(output.stderr.replace('error: ', ''))}",
            patch.name,
        )
    outside = sorted(path for path in paths if not _is_patchable(path))
    if outside:
        raise PatchError(
            f"{patch.name} patches {', '.join(outside)}: a patch may change upstream's files in {PACKAGE}/ only",
            patch.name,
        )
    return paths


def _moved_hunks(stderr: str) -> str:
    moved, path = [], ""
    for line in stderr.splitlines():
        if line.startswith("Checking patch "):
            path = line[len("Checking patch ") :].rstrip(".")
        elif re.match(r"Hunk #\d+ succeeded at .*\(offset ", line):
            moved.append(f"{path}: {line}")
    return "\n".join(moved)


def _does_not_apply(patch: Patch, tree: Path, output: _Output, release: str) -> PatchError:
    # The tree is thrown away after this, so let git try hunk by hunk to learn which ones it rejects.
    rejected: list[Hunk] = []
    path, headers = "", []
    for line in _git_apply(patch, tree, "--reject", "--verbose").stderr.splitlines():
        applying = re.match(r"Applying patch (.+) with \d+ rejects?\.\.\.", line)
        hunk = re.match(r"Rejected hunk #(\d+)\.", line)
        if applying:
            path = applying[1]
            reject = tree / f"{path}.rej"
            text = reject.read_text(encoding="utf-8", errors="replace") if reject.exists() else ""
            headers = [line for line in text.splitlines() if line.startswith("@@ ")]
        elif hunk:
            rejected.append(Hunk(path, int(hunk[1]), headers.pop(0) if headers else ""))
    lines = (line[len("error: ") :] for line in output.stderr.splitlines() if line.startswith("error: "))
    errors = [line for line in lines if not line.startswith("while searching for")]
    reasons = "\n".join(map(str, rejected)) or "\n".join(errors)
    return PatchError(
        f"{patch.name} does not apply to {release}:\n{_indent(reasons)}\n"
        "Refresh the patch: patches/README.md says how.",
        patch.name,
        rejected,
    )


# the record, and the metadata that must follow upstream's


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
            provenance.AppliedPatch(
                patch.name, provenance.sha256(patch.content), provenance.patch_subject(patch.content)
            )
            for patch in patches
        ),
        files={path: provenance.sha256(content) for path, content in sorted(files.items())},
    )


def metadata_differences(
    release: Release,
    *,
    version: str,
    requires_python: str,
    dependencies: Iterable[str],
    extras: Mapping[str, list[str]],
) -> list[str]:
    """What must change in pyproject.toml to follow the release: one message each, with the line to write."""
    headers = HeaderParser().parsestr(release.metadata)
    messages = []

    if not re.fullmatch(rf"{re.escape(release.version)}\+xpos\.[1-9]\d*", version):
        messages.append(f'version is "{version}", write: version = "{release.version}+xpos.1" (or a later +xpos.<n>)')

    python = headers["Requires-Python"] or ""
    if SpecifierSet(requires_python) != SpecifierSet(python):
        advice = f'write: requires-python = "{python}"' if python else "and upstream has none: remove it"
        messages.append(f'requires-python is "{requires_python}", {advice}')

    by_extra: dict[str, list[str]] = {"": []}
    by_extra.update({_normalized(extra): [] for extra in headers.get_all("Provides-Extra", [])})
    for line in headers.get_all("Requires-Dist", []):
        requirement, extra = _without_extra(line)
        by_extra.setdefault(extra, []).append(requirement)

    wanted = sorted(by_extra.pop(""))
    if {*map(_comparable, dependencies)} != {*map(_comparable, wanted)}:
        messages.append(f"dependencies differ from upstream's, write: dependencies = {json.dumps(wanted)}")
    for extra, requirements in sorted(by_extra.items()):
        ours = extras.get(extra)
        lacking = sorted({*map(_comparable, requirements)} - {*map(_comparable, ours or [])})
        if ours is None or lacking:
            messages.append(f"extra {extra} lacks upstream's requirements, add: {extra} = {json.dumps(lacking)}")
    return messages


def _without_extra(line: str) -> tuple[str, str]:
    """A Requires-Dist line as it stands in pyproject.toml, and the extra it is under ("" for none)."""
    requirement, _, marker = (part.strip() for part in line.partition(";"))
    match = re.search(r"""extra\s*==\s*(['"])(?P<extra>[^'"]+)\1""", marker)
    extra = _normalized(match["extra"]) if match else ""
    if match:
        marker = re.sub(r"^\s*and\s+|\s+and\s*$", "", marker[: match.start()] + marker[match.end() :]).strip()
        marker = re.sub(r"^\((.*)\)$", r"\1", marker)
    return (f"{requirement}; {marker}" if marker else requirement), extra


def _comparable(requirement: str) -> str:
    parsed = Requirement(requirement)
    parsed.name = _normalized(parsed.name)
    return str(parsed)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# the files in a checkout or an unpacked sdist


def own_module() -> dict[str, Path]:
    """The files of the fork's own module by their path in the package: one copy in the checkout, for every line."""
    return {path.relative_to(CHECKOUT).as_posix(): path for path in sorted((CHECKOUT / OWN_MODULE).rglob("*.py"))}


def build_inputs(line_dir: Path) -> dict[str, Path]:
    """What a build of the line reads besides the package, by its path in the checkout and in an sdist."""
    names = ("upstream.txt", "series", *provenance.read_series(line_dir))
    paths = (CHECKOUT / "hatch_build.py", *(line_dir / name for name in names))
    return {path.relative_to(CHECKOUT).as_posix(): path for path in paths}


def verify_carried(root: Path, line_dir: Path, version: str) -> provenance.Record:
    """Check the patched files that an sdist carries, and its patches, against its record."""
    record = provenance.read_record(root / PACKAGE)
    if record is None:
        raise BuildError(f"this sdist lacks {provenance.RECORD_PATH}: get a complete one, or build from a checkout")
    pin = provenance.read_pin(line_dir / "upstream.txt")
    problems = []
    for path in provenance.modified_files(root / PACKAGE, record):
        problems.append(f"{path} {'was modified' if (root / path).exists() else 'is missing'}")
    problems += [f"{path} was added" for path in _modules(root) if path not in record.files]
    patches = [(patch.name, provenance.sha256(patch.content)) for patch in read_patches(line_dir)]
    if patches != [(patch.name, patch.sha256) for patch in record.patches]:
        problems.append(f"the patches in patches/{line_dir.name}/ are not those of the record")
    if (pin.name, pin.version) != (record.upstream_name, record.upstream_version) or (
        record.upstream_sha256 not in pin.hashes
    ):
        problems.append(f"patches/{line_dir.name}/upstream.txt pins another release than the record's")
    if record.version != version:
        problems.append(f"pyproject.toml has version {version}, the record {record.version}")
    if problems:
        raise BuildError(
            f"this sdist does not match its own record, {provenance.RECORD_PATH}:\n{_indent(chr(10).join(problems))}\n"
            "Unpack the sdist afresh to build what was published; make changes in a checkout, as a patch."
        )
    return record


def local_edits(root: Path, files: Mapping[str, bytes]) -> list[str]:
    """The upstream files in a checkout's package folder that no build wrote there, and that `files` would not give.

    A build's own files are known by the record and, if an install was interrupted, by the journal.
    """
    known = _known_hashes(root)
    edits = []
    for path in {*_modules(root), *known, *files}:
        found = provenance.file_sha256(root / path)
        expected = {*known.get(path, ()), *([provenance.sha256(files[path])] if path in files else [])}
        if found is not None and found not in expected:
            edits.append(path)
    return sorted(edits)


def refuse_local_edits(root: Path, files: Mapping[str, bytes]) -> None:
    edits = local_edits(root, files)
    if edits:
        raise BuildError(
            "these files were edited here and would be lost or left out, nothing was changed:\n"
            f"{_indent(chr(10).join(edits))}\n"
            "Ways out: turn the edits into a patch (patches/README.md says how); or delete the files to discard them, "
            f"then run: {provenance.refresh_command(root)}"
        )


def install_editable(root: Path, files: Mapping[str, bytes], record: provenance.Record) -> None:
    """Put the patched files into a checkout's package folder, in place of an earlier build's.

    Local edits are refused before anything is written. The journal comes first and the record last, so that the next
    run, after an interruption at any point, knows each file as the earlier build's, as this one's, or as edited.
    """
    with _alone_in(root):
        refuse_local_edits(root, files)
        known = _known_hashes(root)
        for path, digest in record.files.items():
            known.setdefault(path, set()).add(digest)
        journal = {path: sorted(digests) for path, digests in sorted(known.items())}
        pending = root / provenance.PENDING_PATH
        try:
            _write_atomically(pending, json.dumps(journal, indent=2).encode() + b"\n")
            for path, content in files.items():
                _write_atomically(root / path, content)
            for path in sorted(set(known) - set(files)):
                (root / path).unlink(missing_ok=True)
            _write_atomically(root / provenance.RECORD_PATH, record.to_json().encode())
            pending.unlink()
        except OSError as error:
            raise BuildError(f"could not write the package's files: {error}; run the same command again") from None


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits for another build that writes there; the system frees the lock when a process ends, however it does."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # some file systems have no locks
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _modules(root: Path) -> list[str]:
    """The Python files in the package folder but the fork's own: upstream's, or someone's."""
    paths = (path.relative_to(root).as_posix() for path in (root / PACKAGE).rglob("*.py"))
    return sorted(path for path in paths if not _is_own(path))


def _known_hashes(root: Path) -> dict[str, set[str]]:
    known: dict[str, set[str]] = {}
    path = provenance.RECORD_PATH
    try:
        record = provenance.read_record(root / PACKAGE)
        written = [(name, [digest]) for name, digest in record.files.items()] if record else []
        path = provenance.PENDING_PATH
        if (root / path).exists():
            written += json.loads((root / path).read_text(encoding="utf-8")).items()
    except (ValueError, AttributeError):
        raise BuildError(
            f"{path}, which tells a build's files from edited ones, cannot be read: delete it, "
            "and the build names the files that differ from what it would write"
        ) from None
    for name, digests in written:
        known.setdefault(name, set()).update(digests)
    return known


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


# the hook


class PatchedReleaseHook(BuildHookInterface[Any]):
    """Runs the above for hatchling. `line` in its configuration is the folder of patches, from this file's folder."""

    _temporary: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            included = self._prepare(editable=version == "editable")
            taken = {*included.values()}
            # hatchling's own entries, but one for what is given here: an archive would have both
            kept = {source: path for source, path in build_data["force_include"].items() if path not in taken}
            build_data["force_include"] = {**kept, **included}
            if self.target_name == "wheel":
                # as upstream's: where its metadata has no Requires-Python, hatchling would add Python 2
                build_data["tag"] = "py3-none-any"
        except (BuildError, provenance.FormatError, OSError) as error:
            self._clean_up()
            # One message and a non-zero exit: an exception would bury it under hatchling's frames.
            self.app.abort(f"\nerror: {error}\n")
        except BaseException:
            self._clean_up()
            raise

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._clean_up()

    def _prepare(self, *, editable: bool) -> dict[str, str]:
        """The files to include and their paths there: the package and, in an sdist, what a build from it needs."""
        root = Path(self.root)
        line = self.config.get("line")
        if not isinstance(line, str) or not (CHECKOUT / line).is_dir():
            raise BuildError(f"pyproject.toml: the custom hook's `line` must name a folder of patches, not {line!r}")
        line_dir = CHECKOUT / line
        own_version = self.metadata.version

        if (root / "PKG-INFO").is_file():
            record = verify_carried(root, line_dir, own_version)
            included = {path: root / path for path in (*record.files, provenance.RECORD_PATH)}
        else:
            pin = provenance.read_pin(line_dir / "upstream.txt")
            patches = read_patches(line_dir)
            release = fetch_release(pin)
            self._check_metadata(release)
            files = apply_series(release.files, patches, release=str(pin))
            if editable and root != CHECKOUT:
                # a package is imported from one folder, so this one gets a copy of the own module
                files.update({path: source.read_bytes() for path, source in own_module().items()})
            record = make_record(own_version, line_dir.name, release, patches, files)
            if editable:
                install_editable(root, files, record)
            else:
                refuse_local_edits(root, files)
                files[provenance.RECORD_PATH] = record.to_json().encode()
                if self.target_name == "sdist" and root != CHECKOUT:
                    files["pyproject.toml"] = self._pyproject_of_sdist()
                self._temporary = tempfile.TemporaryDirectory(prefix="x-transformers-")
                made = Path(self._temporary.name)
                write_files(files, made)
                included = {path: made / path for path in files}

        if editable:
            return {}
        included.update(own_module())
        if self.target_name == "sdist":
            included.update(build_inputs(line_dir))
        return {str(source): path for path, source in included.items()}

    def _pyproject_of_sdist(self) -> bytes:
        """pyproject.toml of a line in a folder of its own, as an sdist has it: with this file beside it."""
        here = f'path = "{self.config["path"]}"'
        text = Path(self.root, "pyproject.toml").read_text(encoding="utf-8")
        if text.count(here) != 1:
            raise BuildError(f"pyproject.toml: the custom hook must have the line {here} once, for an sdist to change")
        return text.replace(here, 'path = "hatch_build.py"').encode()

    def _check_metadata(self, release: Release) -> None:
        core = self.metadata.core
        messages = metadata_differences(
            release,
            version=self.metadata.version,
            requires_python=core.requires_python,
            dependencies=core.dependencies,
            extras=core.optional_dependencies,
        )
        if messages:
            raise BuildError(
                f"pyproject.toml does not follow {release.name} {release.version}:\n{_indent(chr(10).join(messages))}"
            )

    def _clean_up(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None
