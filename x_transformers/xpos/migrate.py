"""Carry a model that was trained on upstream's xPos over to this fork, and prove that it gives the same answers.

Only models with learned memory key / values (`attn_num_mem_kv`) need it. Upstream left those keys unscaled, while the
queries carried ζ ** ((m - c) / S) with c = n // 2 at sequence length n; here the keys are at position 0 and carry
ζ ** ((c - 0) / S) themselves. At the length that a model was trained at, the difference is a constant factor of each
rotated dimension, so folding it into the parameter once makes the two the same there. At other lengths they differ, and
upstream's answer is the one that changes with the length.

The proof, of a checkpoint, does not trust the fold: on a float64 copy of the model, with the weights as they were, it
computes what upstream did at the length trained at. There the table of rotary embeddings is passed in, with that length
as its window, and where it has the position of the memory keys it leaves them as they are. That must be what the folded
weights give with no more said, to the tolerance that `subject` has for float64. What is written are these weights,
rounded to the dtype of the checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import Attention
from x_transformers.x_transformers import AttentionLayers

from . import formula, theirs
from .limits import longest_window
from .net import Inputs, Net, UsageError, duplicate, is_patched, name_of, rotates_neighbors
from .subject import Subject, deviation

SAFETENSORS = ".safetensors"

# Positions that are compared: what they attend to is the same for each, and n * n scores in float64 are large.
_LONGEST_COMPARED = 1_024


@torch.no_grad()
def fold_mem_kv_(model: nn.Module, seq_len: int, *, context_pos: bool = False) -> int:
    """Fold the scale of `seq_len`, the length trained at, into the memory keys of `model`, in place.

    Load the checkpoint first, fold once, and save. Returns the number of attention layers that were changed.

    `seq_len` is the number of positions attended over in training, the tokens and whatever is prepended to them.
    `context_pos` says that the model is called with `context_pos`: only then do memory keys of cross attention count
    as keys at position 0.

    Raises ValueError if `seq_len` is not positive, if the model has no memory keys that xPos applies to, if the result
    leaves the range of the parameter's dtype, and for `attn_qk_norm`, which normalises the memory keys, so that no
    factor can be folded into them. Nothing is changed then.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be the length that the model was trained at, at least 1, got {seq_len}")
    found = list(_with_mem_kv(model, context_pos=context_pos))
    if not found:
        raise ValueError("model has no layer with both rotary_xpos and attn_num_mem_kv: it needs no conversion")
    if any(attention.qk_norm for _, attention in found):
        raise ValueError(
            "model has attn_qk_norm, which normalises mem_k after any factor was folded into it, so there is no exact "
            "conversion: fine-tune the model on this fork, or stay with the release that it was trained on"
        )
    folded = []
    for rotary, attention in found:
        mem_k, scale = attention.mem_k.clone(), _factor(rotary, seq_len)
        # (heads, num_mem_kv, dim_head): the first dims of the heads that are rotated, in 1.27.5 all
        rotated = mem_k[-getattr(attention, "rotate_num_heads", attention.heads) :, :, : len(scale)]
        rotated.copy_(rotated.double() * scale.to(mem_k.device))
        if bool(attention.mem_k.isfinite().all()) and not bool(mem_k.isfinite().all()):
            raise ValueError(
                f"memory keys times a factor of up to {float(scale.max()):.2g} leave the range of "
                f"{name_of(mem_k.dtype)}: convert a copy of the model in float32 or bfloat16"
            )
        folded.append(mem_k)
    for (_, attention), mem_k in zip(found, folded):
        attention.mem_k.copy_(mem_k)
    return len(found)


def _with_mem_kv(model: nn.Module, *, context_pos: bool = False) -> Iterator[tuple[Any, Any]]:
    """The `RotaryEmbedding` and the attention of each layer with memory keys that xPos applies to."""
    layers: Any
    for layers in model.modules():
        rotary = layers.rotary_pos_emb if isinstance(layers, AttentionLayers) else None
        if rotary is None or rotary.scale is None:
            continue
        for layer_type, (_, block, _) in zip(layers.layer_types, layers.layers):
            if isinstance(block, Attention) and block.num_mem_kv > 0 and (layer_type == "a" or context_pos):
                yield rotary, block


def _factor(rotary: Any, seq_len: int) -> Tensor:
    """What each rotated dim of a memory key is multiplied by, float64 `(rotated dims,)`."""
    of_pairs: Tensor = formula.decays(2 * rotary.inv_freq.shape[0]) ** (-(seq_len // 2) / rotary.scale_base)
    return of_pairs.repeat_interleave(2) if rotates_neighbors() else of_pairs.repeat(2)


# a checkpoint


@torch.no_grad()
def migrate(spec: str, source: Path, output: Path, length: int, key: str | None = None) -> tuple[bool, str]:
    """Convert the checkpoint `source` of the model `spec` into the file `output`.

    `length` is that which was trained at, in positions, memory tokens and whatever is prepended included. Returns
    whether the answers are those of before, and a report. If they are not, nothing is written. Raises UsageError where
    it cannot be done.
    """
    if not is_patched():
        raise UsageError("this x_transformers is upstream's, where a checkpoint gives what it gave; install the fork")
    _check_output(source, output)
    state, save = _read(source, key)
    if length < 1:
        raise UsageError(f"argument --length: {length} is not the length of a sequence; give 1 or more")
    model = theirs.build(spec)
    theirs.find(spec, model)
    given = _complete(model, state)
    before, after = _with_weights(model, given), _with_weights(model, given)
    try:
        fold_mem_kv_(after, length)
    except ValueError as error:
        raise UsageError(f"argument --model: {spec}: {error}") from None

    factors = {id(attention.mem_k): _factor(rotary, length) for rotary, attention in _with_mem_kv(after)}
    memory = {name: value for name, value in after.state_dict(keep_vars=True).items() if id(value) in factors}
    for name, value in memory.items():
        # in place, so that what shares its memory goes on doing so
        given[name].copy_(value)
        if bool(value.isfinite().all()) and not bool(given[name].isfinite().all()):
            reason = f"folded for {length:,} it leaves the range of {name_of(given[name].dtype)}"
            raise UsageError(f"argument CHECKPOINT: {name}: {reason}; convert a copy in float32 or bfloat16")

    apart, allowed, size, compared = 0.0, 0.0, 0.0, length
    for old, new in _nets(spec, before, after):
        inputs = _inputs(old, length)
        expected = as_upstream(old, inputs, length)
        apart, size = max(apart, deviation(expected, new(inputs)[0])), max(size, float(expected.abs().max()))
        if apart < math.inf:
            allowed = max(allowed, Subject(old, inputs).of_calls)
        compared = min(compared, old.positions(inputs.length))

    passed = apart <= allowed
    if passed:
        _write(save, output, like=source)
    names, by = [name for name in memory if name in state], max(float(each.max()) for each in factors.values())
    count, dtypes = f"{len(names)} parameter{'s' * (len(names) > 1)}", {name_of(given[name].dtype) for name in memory}
    lines = [
        f"folded    {count} in {', '.join(sorted(dtypes))}, by up to {by:.4g}, for {length:,}",
        *(f"          {name}" for name in names),
        f"compared  the first {compared:,} of {length:,} positions with what upstream gives, in float64",
        f"          {apart:.1e} apart, {allowed:.1e} allowed, outputs of up to {size:.2g}",
        f"written   {output}" if passed else "FAIL      the answers are not those of before: nothing was written",
    ]
    return passed, "\n".join(lines)


# the proof


def as_upstream(net: Net, inputs: Inputs, length: int) -> Tensor:
    """What upstream gave for the first positions of a sequence of `length`, of which `inputs` are.

    The center is `length // 2` and memory keys, at position 0, are rotated as that position but never scaled.
    """
    rotary: Any = net.layers.rotary_pos_emb
    freqs, scale = rotary(torch.arange(length, device=net.device), offset=0, seq_len=length)
    positions = net.positions(inputs.length)
    # a table that is passed in starts with the position of the memory keys
    freqs = torch.cat((freqs[..., :1, :], freqs[..., :positions, :]), dim=-2)
    scale = torch.cat((torch.ones_like(scale[..., :1, :]), scale[..., :positions, :]), dim=-2)
    return net(inputs, rotary_pos_emb=(freqs, scale))[0]


def _with_weights(model: nn.Module, given: Mapping[str, Any]) -> nn.Module:
    """A float64 copy of the model with these weights. Raises UsageError if they are of another model."""
    copied = duplicate(model).to(device="cpu", dtype=torch.float64)
    try:
        copied.load_state_dict(given)
    except RuntimeError as error:
        # torch's own list of what is missing, unexpected or of another shape
        reasons = " ".join(line.strip()[:150] for line in str(error).splitlines()[1:4])
        raise UsageError(
            f"argument CHECKPOINT: it is not of the model that the factory builds: {reasons}; give the factory of the "
            "model that was saved, and with --key the name of its state dict in the file, if it has one"
        ) from None
    return copied


def _nets(spec: str, *models: nn.Module) -> Iterator[list[Net]]:
    """Each stack of layers with xPos, of every model."""
    for targets in zip(*(theirs.find(spec, model).values() for model in models)):
        nets = [theirs.open_net(spec, target)[0] for target in targets]
        # memory tokens between the others: no number of them need make just the length trained at
        spaced = nets[0].positions(2) - nets[0].positions(1) != 1
        yield [Net(net.layers) for net in nets] if spaced else nets


def _inputs(net: Net, length: int) -> Inputs:
    """As many of the first positions of a sequence of `length` as are compared."""
    extra = net.positions(1) - 1
    # one position more is that of the memory keys
    room = longest_window(torch.float64, net.layers.rotary_pos_emb.scale_base) - 1
    text = min(min(length, _LONGEST_COMPARED, room) - extra, net.max_seq_len or length)
    if text < 1:
        raise UsageError(f"argument --length: {length} positions are no more than the {extra} memory tokens; give more")
    return net.inputs(1, text)


# the files


def _check_output(source: Path, output: Path) -> None:
    """Refuse an output that is there already, the checkpoint itself above all, or that could not be written."""
    if os.path.lexists(output):
        raise UsageError(f"argument --output: {output} exists already; give another path")
    if (source.suffix == SAFETENSORS) != (output.suffix == SAFETENSORS):
        expected = f"{'' if source.suffix == SAFETENSORS else 'not '}end in {SAFETENSORS}"
        raise UsageError(
            f"argument --output: {output} must {expected}, as the format stays that of {source.name}; rename it"
        )
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UsageError(f"argument --output: cannot write to the folder {output.parent}; make it or give another path")


def _read(path: Path, key: str | None) -> tuple[MutableMapping[str, Any], Callable[[str], None]]:
    """The state dict in a file, on the CPU, and what saves the file's content, with that state dict in it, again.

    `key` says where in a dict it is. Nothing in the file is run: it is read with `weights_only=True`.
    """
    if path.suffix == SAFETENSORS and key is not None:
        raise UsageError(f"argument --key: {path.name} is a safetensors file, which has no dict; leave it out")
    try:
        if path.suffix == SAFETENSORS:
            from safetensors import safe_open
            from safetensors.torch import save_file

            with safe_open(path, framework="pt", device="cpu") as file:
                # in the order of the file
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return state, partial(save_file, state, metadata=file.metadata())
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        reason = f"a {SAFETENSORS} file needs safetensors, which is not installed; pip install safetensors"
        raise UsageError(f"argument CHECKPOINT: {reason}") from None
    except Exception as error:  # whatever a file that is none of theirs makes them raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UsageError(
            f"argument CHECKPOINT: {path} cannot be read as tensors and plain values ({reason}); give the file of a "
            "state dict, as written by torch.save(model.state_dict(), …)"
        ) from error
    found: Any = content
    # a name with dots, or names of dicts in dicts
    for step in [] if key is None else [key] if isinstance(content, Mapping) and key in content else key.split("."):
        found = found.get(step) if isinstance(found, Mapping) else None
    if not isinstance(found, MutableMapping) or not all(isinstance(name, str) for name in found):
        holds = ", ".join(map(str, content)) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        argument = f"--key: {key!r}" if key is not None else "CHECKPOINT: it"
        raise UsageError(f"argument {argument} is no state dict; {path} holds {holds[:120]}; give --key or save one")
    return found, partial(torch.save, content)


def _complete(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with every name of the model's: one that is not there may be another's tensor, as tied weights are."""
    own = model.state_dict(keep_vars=True)
    given = {id(own[name]): value for name, value in state.items() if name in own}
    return {**{name: given[id(value)] for name, value in own.items() if id(value) in given}, **state}


def _write(save: Callable[[str], None], output: Path, *, like: Path) -> None:
    """Write all of it, or nothing, and never over a file that is there; with the permissions of `like`."""
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            temporary = os.path.join(folder, output.name)
            save(temporary)
            shutil.copymode(like, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            try:
                # unlike a rename, it fails where there is a file by now
                os.link(temporary, output)
            except OSError:
                # there is one, or a file system without hard links
                if os.path.lexists(output):
                    raise FileExistsError("it exists by now; give another path") from None
                os.replace(temporary, output)
    except Exception as error:  # whatever the writers raise; torch's has the reason in the first line
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"argument --output: cannot write {output}: {reason}") from error
