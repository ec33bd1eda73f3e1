"""The text that the check reads, as bytes: that of Python's own help by default."""

from __future__ import annotations

from pathlib import Path

DEFAULT_NAME = "pydoc_data.topics"


class TextError(ValueError):
    """A text that cannot be read or is too short; the message names the argument and the way out."""


def read(path: str | None, max_len: int) -> bytes:
    """The first `max_len` bytes of the file, or of the topics of Python's help where `path` is None.

    Raises TextError if there are fewer, or none that can be read.
    """
    if path is None:
        name, content = DEFAULT_NAME, _topics()
    else:
        name = path
        try:
            with Path(path).open("rb") as file:
                content = file.read(max_len)
        except OSError as error:
            raise TextError(f"argument --text: cannot read {path}: {error.strerror}; give a readable file") from None
    if len(content) < max_len:
        raise TextError(
            f"argument --max-len: {max_len} is more than the {len(content)} bytes of {name}; "
            "give a longer text with --text FILE or a smaller --max-len"
        )
    return content[:max_len]


def _topics() -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextError(
            f"argument --text: this Python comes without {DEFAULT_NAME}, the default; give a text with --text FILE"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics)).encode()
