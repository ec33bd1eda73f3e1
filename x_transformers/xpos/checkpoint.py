"""Checkpoints: a state dict that `torch.save` wrote, alone or in a dict, or a safetensors file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .net import duplicate

SAFETENSORS = ".safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used; the message names the argument and the way out."""


@dataclass
class Checkpoint:
    """`content` is what the file holds, and `state` the state dict in it; `metadata` is that of a safetensors file."""

    content: Any
    state: MutableMapping[str, Any]
    metadata: dict[str, str] | None = None
    is_safetensors: bool = False


# where it is, and where it goes


def check_paths(source: Path, output: Path) -> None:
    """Refuse an output that is there already, the checkpoint itself above all, or that could not be written."""
    if not source.is_file():
        kind = "a folder" if source.is_dir() else "not there"
        raise CheckpointError(f"argument CHECKPOINT: {source} is {kind}; give the file of a state dict")
    if output.exists() and output.samefile(source):
        raise CheckpointError(f"argument --output: {output} is the checkpoint itself; give another path")
    if os.path.lexists(output):
        raise CheckpointError(f"argument --output: {output} exists already; remove it or give another path")
    if (source.suffix == SAFETENSORS) != (output.suffix == SAFETENSORS):
        expected = f"end in {SAFETENSORS}" if source.suffix == SAFETENSORS else f"not end in {SAFETENSORS}"
        raise CheckpointError(
            f"argument --output: {output} must {expected}, as the format stays that of {source.name}; rename it"
        )
    folder = output.parent
    if not folder.is_dir():
        raise CheckpointError(f"argument --output: there is no folder {folder}; make it, or give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"argument --output: cannot write to the folder {folder}; give another path")


# reading


def read(path: Path, key: str | None) -> Checkpoint:
    """The checkpoint in a file, with all tensors on the CPU; `key` says where in a dict the state dict is.

    Nothing in the file is run: it is read with `weights_only=True`.
    """
    if path.suffix == SAFETENSORS:
        if key is not None:
            raise CheckpointError(f"argument --key: {path.name} is a safetensors file, which has no dict; leave it out")
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none of torch's makes it raise
        raise _unreadable(path, error) from error
    return Checkpoint(content, _state_in(content, key, path))


def _read_safetensors(path: Path) -> Checkpoint:
    safetensors = _safetensors("argument CHECKPOINT")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata()
            # in the order of the file
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise _unreadable(path, error) from error
    return Checkpoint(state, state, metadata, is_safetensors=True)


def _safetensors(argument: str) -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise CheckpointError(
            f"{argument}: a {SAFETENSORS} file needs safetensors, which is not installed; pip install safetensors"
        ) from None
    return safetensors


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    return CheckpointError(
        f"argument CHECKPOINT: {path} cannot be read as tensors and plain values ({reason}); give the file of a state "
        "dict, as written by torch.save(model.state_dict(), …)"
    )


def _state_in(content: Any, key: str | None, path: Path) -> MutableMapping[str, Any]:
    found, argument = content, "CHECKPOINT"
    if key is not None:
        argument = "--key"
        # a name with dots, or names of dicts in dicts
        for step in [key] if isinstance(content, Mapping) and key in content else key.split("."):
            found = found.get(step) if isinstance(found, Mapping) else None
    if not _is_state(found):
        what = f"{path} is not itself a state dict" if key is None else f"{path} has no state dict {key!r}"
        raise CheckpointError(f"argument {argument}: {what}; {_keys_hint(content)}")
    return found  # type: ignore[no-any-return]


def _is_state(content: Any) -> bool:
    if not isinstance(content, MutableMapping) or not content:
        return False
    # a module may keep an extra state, which is anything
    return all(isinstance(name, str) for name in content) and all(
        isinstance(value, Tensor) or name.endswith("_extra_state") for name, value in content.items()
    )


def _keys_hint(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}; save model.state_dict()"
    states = [str(name) for name, value in content.items() if _is_state(value)]
    if states:
        return f"give --key with one of {', '.join(states[:5])}"
    return f"it holds {', '.join(str(name) for name in list(content)[:5]) or 'nothing'}; save model.state_dict()"


# the model that it is of


def complete(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with a name for each of the model's: one that is not there may be another's tensor, as tied weights are.

    Raises CheckpointError, with the names, if it is not of this model.
    """
    given = dict(state)
    for names in aliases(model).values():
        there = [name for name in names if name in state]
        given.update({name: state[there[0]] for name in names if there and name not in state})
    try:
        duplicate(model).to("cpu").load_state_dict(given)
    except RuntimeError as error:
        # torch's own list of what is missing, unexpected or of another shape
        reasons = " ".join(line.strip()[:150] for line in str(error).splitlines()[1:4])
        way_out = "give the factory of the model that was saved"
        raise CheckpointError(
            f"argument CHECKPOINT: it is not of the model that the factory builds: {reasons}; {way_out}"
        ) from None
    return given


def aliases(model: nn.Module) -> dict[int, list[str]]:
    """The names in the state dict of each parameter, by its identity."""
    found: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        found.setdefault(id(value), []).append(name)
    return found


# writing


def write(checkpoint: Checkpoint, output: Path, like: Path) -> None:
    """Write all of it, or nothing, and never over a file that is there; with the permissions of `like`.

    Raises CheckpointError.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".new")
        os.close(handle)
        if checkpoint.is_safetensors:
            save_file = _safetensors("argument --output").torch.save_file
            save_file(dict(checkpoint.state), temporary, metadata=checkpoint.metadata)
        else:
            torch.save(checkpoint.content, temporary)
        shutil.copymode(like, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _place(temporary, output)
    except FileExistsError:
        raise CheckpointError(f"argument --output: {output} exists by now; remove it or give another path") from None
    except (OSError, RuntimeError) as error:  # torch's own writer has the reason in the first line
        raise CheckpointError(f"argument --output: cannot write {output}: {str(error).splitlines()[0]}") from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def _place(temporary: str, output: Path) -> None:
    try:
        # unlike a rename, it fails where there is a file by now
        os.link(temporary, output)
    except FileExistsError:
        raise
    except OSError:
        # a file system without hard links
        if os.path.lexists(output):
            raise FileExistsError from None
        os.replace(temporary, output)
