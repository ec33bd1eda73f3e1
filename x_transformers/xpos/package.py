"""Which x_transformers is being checked: where it is, what it was built from and whether it still is that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import x_transformers
from x_transformers.x_transformers import RotaryEmbedding

from . import provenance


@dataclass(frozen=True)
class Package:
    """`distribution` is the version that the environment's metadata gives, None where it names none.

    From `version` on it is what the record of the build has, None or empty where there is none. `unpatched` and
    `modified` hold one message for each thing that is wrong.
    """

    path: str
    distribution: str | None = None
    version: str | None = None
    upstream: Mapping[str, str] | None = None
    line: str | None = None
    patches: tuple[str, ...] = ()
    unpatched: tuple[str, ...] = ()
    modified: tuple[str, ...] = ()


def describe() -> Package:
    """The package that `import x_transformers` gives here."""
    path = Path(x_transformers.__file__).parent
    distribution, record, unpatched, modified = None, None, [], []
    with suppress(metadata.PackageNotFoundError):
        distribution = metadata.version("x-transformers")
    try:
        record = provenance.read_record(path)
        if record is None or not record.patches:
            unpatched.append("there is no record of patches")
        files = provenance.modified_files(path, record)
        modified += [f"not as they were built: {', '.join(files)}"] if files else []
    except provenance.FormatError as error:
        modified.append(str(error))
    if "seq_len" not in inspect.signature(RotaryEmbedding.forward).parameters:
        unpatched.append("RotaryEmbedding.forward takes no seq_len")
    found = Package(str(path), distribution, unpatched=tuple(unpatched), modified=tuple(modified))
    if record is None:
        return found
    upstream = {"name": record.upstream_name, "version": record.upstream_version}
    patches = tuple(patch.name for patch in record.patches)
    return replace(found, version=record.version, upstream=upstream, line=record.line, patches=patches)
