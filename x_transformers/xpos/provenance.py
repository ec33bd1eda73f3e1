"""Where an installed copy of this package came from, and whether it still is what was built.

The build writes a record, `x_transformers/xpos/provenance.json`: the pinned upstream release, the patches and the
hash of every file that upstream's release and the patches gave. This module reads it, compares the files with it,
and, in a checkout, says whether the pin, the series or a patch has changed since.

    >>> from x_transformers.xpos import provenance
    >>> record = provenance.read_record()
    >>> record.upstream_version, [patch.name for patch in record.patches]   # doctest: +SKIP
    >>> provenance.modified_files(), provenance.staleness()                 # doctest: +SKIP

It uses the standard library alone: hatch_build.py loads this file by its path, where torch is not installed.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGE = "x_transformers"
RECORD_PATH = f"{PACKAGE}/xpos/provenance.json"
# The same name beside it holds the journal of an editable install that has not finished.
PENDING_PATH = f"{RECORD_PATH}.pending"
REFRESH_COMMAND = 'pip install -c constraints.txt -e ".[test]"'

_FORMAT = 1

_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*==\s*(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"(?P<hashes>(?:\s+--hash=sha256:[0-9a-f]{64})+)"
)


class FormatError(ValueError):
    """A pin, a series, a patch or a record that cannot be read; the message names the file and the way out."""


@dataclass(frozen=True)
class AppliedPatch:
    name: str
    sha256: str
    subject: str


@dataclass(frozen=True)
class Record:
    """What the build was made of. `files` maps a path, as in `x_transformers/attend.py`, to its sha256."""

    version: str
    upstream_name: str
    upstream_version: str
    upstream_sha256: str
    line: str
    patches: tuple[AppliedPatch, ...]
    files: Mapping[str, str]

    def to_json(self) -> str:
        fields = {"format": _FORMAT, **asdict(self)}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Pin:
    """The one upstream release that a line starts from, with the hashes that its file may have."""

    name: str
    version: str
    hashes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# the record


def read_record(package_dir: Path | str | None = None) -> Record | None:
    """The record of the package in `package_dir`, the folder `x_transformers` (default: the one this file is in)."""
    path = _root(package_dir) / RECORD_PATH
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        fields: dict[str, Any] = json.loads(text)
        if fields.pop("format") != _FORMAT:
            raise ValueError("format")
        patches = tuple(AppliedPatch(**patch) for patch in fields.pop("patches"))
        record = Record(patches=patches, **fields)
        record.files.items()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FormatError(f"{path.name} is not a record that this version can read: reinstall the package") from None
    return record


def modified_files(package_dir: Path | str | None = None, record: Record | None = None) -> tuple[str, ...]:
    """The files that the record names and that are missing or differ from it; empty where there is no record."""
    root = _root(package_dir)
    record = record or read_record(package_dir)
    if record is None:
        return ()
    return tuple(path for path, expected in sorted(record.files.items()) if file_sha256(root / path) != expected)


def staleness(package_dir: Path | str | None = None, record: Record | None = None) -> tuple[str, ...]:
    """What has changed in the checkout since its package was made, one message each; empty if nothing has.

    Only a package inside a checkout (or an unpacked sdist) can be stale: elsewhere there is nothing to compare with.
    """
    root = _root(package_dir)
    record = record or read_record(package_dir)
    refresh = f"refresh with: {refresh_command(root)}"

    if (root / PENDING_PATH).exists():
        return (f"an editable install was interrupted and {PACKAGE}/ may be incomplete; {refresh}",)
    if record is None:
        return ()
    line_dir = _line_dir(root, record.line)
    if line_dir is None:
        return ()

    try:
        pin = read_pin(line_dir / "upstream.txt")
        patches = {name: sha256((line_dir / name).read_bytes()) for name in read_series(line_dir)}
    except (FormatError, OSError) as error:
        return (str(error),)

    messages = []
    built_from = f"{record.upstream_name}=={record.upstream_version}"
    if (pin.name, pin.version) != (record.upstream_name, record.upstream_version):
        messages.append(f"the pin is {pin} now, {PACKAGE}/ was made from {built_from}; {refresh}")
    elif record.upstream_sha256 not in pin.hashes:
        messages.append(f"the pin's hashes of {pin} changed since {PACKAGE}/ was made; {refresh}")

    made_with = {patch.name: patch.sha256 for patch in record.patches}
    changes = {
        "added": [name for name in patches if name not in made_with],
        "removed": [name for name in made_with if name not in patches],
        "changed": [name for name in patches if made_with.get(name, patches[name]) != patches[name]],
    }
    for change, names in changes.items():
        if names:
            messages.append(f"patches {change} since {PACKAGE}/ was made: {', '.join(names)}; {refresh}")
    if not any(changes.values()) and list(patches) != list(made_with):
        messages.append(f"the order of the patches changed since {PACKAGE}/ was made; {refresh}")
    return tuple(messages)


def refresh_command(root: Path) -> str:
    """What makes the editable install in `root`, the folder that holds the package, anew; to be run in the checkout."""
    # the folder of another line than the default one is a package root, and has its series
    return f"pip install -c constraints.txt -e patches/{root.name}" if (root / "series").is_file() else REFRESH_COMMAND


# the inputs: the pin, the series and the patches of a line


def read_pin(path: Path) -> Pin:
    """The pin of a line: pip's requirements format, one `name==version` and its hashes, nothing else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FormatError(f"{_short(path)} is missing: it pins the upstream release") from None
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in text.replace("\\\n", " ").splitlines()]
    requirements = [line.strip() for line in lines if line.strip()]
    match = _PIN.fullmatch(requirements[0]) if len(requirements) == 1 else None
    if match is None:
        raise FormatError(
            f"{_short(path)} must hold exactly one requirement, as in `name==1.2.3 --hash=sha256:<64 hex digits>`, "
            f"and holds {' | '.join(requirements) or 'none'}"
        )
    return Pin(match["name"], match["version"], tuple(re.findall(r"[0-9a-f]{64}", match["hashes"])))


def read_series(line_dir: Path) -> tuple[str, ...]:
    """The names of a line's patches in order, from its `series` (quilt's format); each file is there."""
    series = line_dir / "series"
    try:
        text = series.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FormatError(f"{_short(series)} is missing: it names the patches in order") from None
    names: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = re.sub(r"(^|\s+)#.*", "", line).split()
        if not words:
            continue
        # quilt allows options after the name; all but its default would change what the patch does
        if words[1:] not in ([], ["-p1"]):
            raise FormatError(f"{_short(series)}, line {number}: one file name a line, not {line.strip()!r}")
        name = words[0]
        if name in names:
            raise FormatError(f"{_short(series)}, line {number}: {name} is named twice")
        if "/" in name or "\\" in name or not (line_dir / name).is_file():
            raise FormatError(f"{_short(series)}, line {number}: {_short(line_dir / name)} does not exist")
        names.append(name)
    return tuple(names)


def patch_subject(patch: bytes) -> str:
    """The subject of a `git format-patch` file without its [PATCH] tag; empty if it has none."""
    subject = email.message_from_bytes(patch, policy=email.policy.default)["Subject"]
    return re.sub(r"^\[PATCH[^]]*\]\s*", "", " ".join(str(subject or "").split()))


def file_sha256(path: Path) -> str | None:
    """The sha256 of a file, None where there is none."""
    try:
        return sha256(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _root(package_dir: Path | str | None) -> Path:
    """The folder that paths in the record start from: the one that holds the package."""
    package = Path(__file__).parent.parent if package_dir is None else Path(package_dir)
    return package.absolute().parent


def _line_dir(root: Path, line: str) -> Path | None:
    # A line other than the default one is a package root of its own, and then is its own folder of patches.
    for folder in (root / "patches" / line, root):
        if (folder / "series").is_file() and (folder / "upstream.txt").is_file():
            return folder
    return None


def _short(path: Path) -> str:
    """A path as a reader of the repository knows it, without where the checkout happens to lie."""
    return "/".join(path.parts[-3:])
