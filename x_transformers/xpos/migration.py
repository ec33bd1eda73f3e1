"""Convert a checkpoint that was trained on upstream's xPos, and prove on its model that it gives the same answers.

The proof does not trust the conversion: on a float64 copy of the model, with the weights as they were, it computes
what upstream did at the length trained at. There the table of rotary embeddings is passed in, with that length as its
window, and where it has the position of the memory keys it leaves them as they are. That must be what the converted
weights give with no more said. What may differ is what the folded memory keys are rounded by, so the tolerance is 4
times what their own rounding does to the same answers: the worst that comes of changing each element by one unit
roundoff, up or down at random. In float64 the two also differ in how exact the angles are, for which `subject` has a
tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint as files
from . import theirs
from .checkpoint import Checkpoint, CheckpointError
from .limits import DTYPES, longest_window
from .migrate import folds
from .net import Inputs, Net, duplicate
from .runs import deviation
from .subject import ROWS, Subject, unit_roundoff

# Positions that are compared: what they attend to is the same for each, and n * n scores in float64 are large.
LONGEST_COMPARED = 1_024

# What a rounding does to the answers differs from one to the next: the worst of some is taken.
_ROUNDINGS = 4


@dataclass(frozen=True)
class Migration:
    """What was done. `parameters` are the names of the memory keys that were changed, once each.

    `deviation` is the largest difference between the outputs of before and after, `size` the largest output, over the
    first `compared` positions of a sequence of `length`.
    """

    length: int
    dtype: str
    parameters: tuple[str, ...]
    largest_factor: float
    compared: int
    deviation: float
    tolerance: float
    size: float

    @property
    def passed(self) -> bool:
        return self.deviation <= self.tolerance


@torch.no_grad()
def migrate(spec: str, model: nn.Module, loaded: Checkpoint, length: int) -> Migration:
    """Fold the memory keys of `loaded` in place, and compare the answers.

    `length` is that which was trained at, in positions, memory tokens and whatever is prepended included. Raises
    CheckpointError, before anything is changed, where it cannot be done.
    """
    if length < 1:
        raise CheckpointError(f"argument --length: {length} is not the length of a sequence; give 1 or more")
    before = files.complete(model, loaded.state)
    try:
        found = folds(model, length)
    except ValueError as error:
        raise CheckpointError(f"argument --model: {spec}: {error}") from None
    aliases = files.aliases(model)
    dtype = _dtype({name: before[name] for fold in found for name in aliases[id(fold.mem_k)]})

    after, changed = dict(before), {}
    for fold in found:
        for name in aliases[id(fold.mem_k)]:
            try:
                after[name] = fold(before[name])
            except ValueError as error:
                raise CheckpointError(f"argument CHECKPOINT: {name}: {error}") from None
            # not one that the file leaves out, as it is another's tensor
            if name in loaded.state:
                changed[name] = after[name]

    names_changed = {name for name, value in after.items() if value is not before[name]}
    compared, apart, tolerance, size = _compare(spec, model, before, after, names_changed, length, dtype)
    for name, folded in changed.items():
        # in place, so that what shares its memory goes on doing so
        loaded.state[name].copy_(folded)
    return Migration(
        length=length,
        dtype=str(dtype).removeprefix("torch."),
        parameters=tuple(changed),
        largest_factor=max(float(fold.factor.max()) for fold in found),
        compared=compared,
        deviation=apart,
        tolerance=tolerance,
        size=size,
    )


def _dtype(memory_keys: dict[str, Tensor]) -> torch.dtype:
    """The one with the fewest digits that the memory keys are in."""
    for name, value in memory_keys.items():
        if value.dtype not in DTYPES.values():
            raise CheckpointError(
                f"argument CHECKPOINT: {name} is in {value.dtype}, which no model can be run in; convert it to bfloat16"
            )
    return max((value.dtype for value in memory_keys.values()), key=unit_roundoff)


def _compare(
    spec: str, model: nn.Module, before: Any, after: Any, changed: set[str], length: int, dtype: torch.dtype
) -> tuple[int, float, float, float]:
    """How many positions were compared, how far apart they are, how far they may be, and the largest of them."""
    compared, apart, tolerance, size = length, 0.0, 0.0, 0.0
    for number in range(len(theirs.find(spec, model))):
        nets = []
        off_by_one = [
            {name: _one_roundoff(value, seed) if name in changed else value for name, value in before.items()}
            for seed in range(_ROUNDINGS)
        ]
        for state in (before, after, *off_by_one):
            copied = duplicate(model).to(device="cpu", dtype=torch.float64)
            copied.load_state_dict(state)
            _softmax_in_float64_(copied)
            net, _ = theirs.open_net(spec, theirs.find(spec, copied)[number])
            if net.is_wrapper and net.positions(2) - net.positions(1) != 1:
                # memory tokens between the others: no number of them need make just this length
                net = Net(net.layers)
            nets.append(net)
        old, new, *off = nets

        extra = old.positions(1) - 1
        rotary: Any = old.layers.rotary_pos_emb
        # one position more is that of the memory keys
        room = longest_window(torch.float64, rotary.scale_base) - 1
        positions = min(length, LONGEST_COMPARED, room, (old.max_seq_len or length) + extra)
        if positions <= extra:
            raise CheckpointError(f"argument --length: {length} positions are no more than the {extra} memory tokens")
        inputs = old.inputs(1, positions - extra)
        expected, found = as_upstream(old, inputs, length), new(inputs)[0]
        compared = min(compared, positions)
        apart = max(apart, deviation(expected, found))
        size = max(size, float(expected.abs().max()))
        forced = max(deviation(as_upstream(net, inputs, length), expected) for net in off)
        tolerance = max(tolerance, 4 * forced)
        if dtype is torch.float64:
            tolerance = max(tolerance, Subject(old, old.inputs(ROWS, positions - extra)).of_calls)
    return compared, apart, tolerance, size


def _softmax_in_float64_(model: nn.Module) -> None:
    """The default softmax works in float32 whatever the dtype, which would drown what is compared."""
    for module in model.modules():
        function = getattr(module, "attn_fn", None)
        if isinstance(function, partial) and function.keywords.get("dtype") is torch.float32:
            module.attn_fn = partial(function, dtype=torch.float64)  # type: ignore[assignment]


def _one_roundoff(value: Tensor, seed: int) -> Tensor:
    """Each element off by one unit roundoff of its dtype, in float64."""
    sign = torch.randint(2, value.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return value.double() * (1 + unit_roundoff(value.dtype) * sign)


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
