"""The record of a build: what the installed package was made from, and whether its files have changed since.

The build writes `x_transformers/xpos/provenance.json`: the pinned upstream release, the patches, and the hash of every
file that they gave. This uses the standard library alone: hatch_build.py loads it by its path, where there is no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGE = "x_transformers"
RECORD_PATH = f"{PACKAGE}/xpos/provenance.json"

_FORMAT = 1


class FormatError(ValueError):
    """A record that cannot be read; the message names the file and the way out."""


@dataclass(frozen=True)
class AppliedPatch:
    name: str
    sha256: str


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
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, sort_keys=True) + "\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_record(package_dir: Path) -> Record | None:
    """The record of the package in `package_dir`, the folder `x_transformers`."""
    path = package_dir.parent / RECORD_PATH
    if not path.exists():
        return None
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != _FORMAT:
            raise ValueError("format")
        patches = tuple(AppliedPatch(**patch) for patch in fields.pop("patches"))
        record = Record(patches=patches, **fields)
        record.files.items()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FormatError(f"{path.name} is not a record that this version can read: reinstall the package") from None
    return record


def modified_files(package_dir: Path) -> tuple[str, ...]:
    """The files that the record names and that are missing or differ from it; empty where there is no record."""
    record, root = read_record(package_dir), package_dir.absolute().parent
    files = record.files if record is not None else {}
    found = {path: sha256((root / path).read_bytes()) for path in files if (root / path).is_file()}
    return tuple(path for path in sorted(files) if found.get(path) != files[path])
