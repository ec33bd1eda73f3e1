"""Which x_transformers is being checked: where it is, what it was built from and whether it still is that."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import x_transformers
from x_transformers.x_transformers import RotaryEmbedding

from . import provenance

DISTRIBUTION = "x-transformers"


@dataclass(frozen=True)
class Package:
    """`distribution` is the version that the environment's metadata gives, None where it names none.

    `unpatched` and `modified` hold one message for each thing that is wrong, and are empty for a package that is what
    this repository builds.
    """

    path: Path
    distribution: str | None
    record: provenance.Record | None
    unpatched: tuple[str, ...] = ()
    modified: tuple[str, ...] = ()

    @property
    def release(self) -> str:
        """The version of this copy as its record has it, or of the distribution, for a message."""
        return self.record.version if self.record else self.distribution or "an unknown version"

    @property
    def problems(self) -> tuple[str, ...]:
        return self.unpatched + self.modified


def describe() -> Package:
    """The package that `import x_transformers` gives here."""
    path = Path(x_transformers.__file__).parent
    try:
        distribution: str | None = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        distribution = None

    record, unpatched, modified = None, [], []
    try:
        record = provenance.read_record(path)
        if record is None or not record.patches:
            unpatched.append("there is no record of patches")
        files = provenance.modified_files(path, record)
        if files:
            modified.append(f"not as they were built: {', '.join(files)}")
    except provenance.FormatError as error:
        modified.append(str(error))
    if "seq_len" not in inspect.signature(RotaryEmbedding.forward).parameters:
        unpatched.append("RotaryEmbedding.forward takes no seq_len")
    return Package(path, distribution, record, tuple(unpatched), tuple(modified))
