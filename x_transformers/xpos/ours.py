"""What the check runs where it is given nothing: small language models, bytes in and logits out, and a text for them.

The models are not trained. Trained weights would hide less than these do: whatever an initialisation makes zero or one
is made random, and queries and keys are large enough that attention is far from uniform, so that a wrong score shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import Attention, Decoder, TransformerWrapper
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import LayerIntermediates

from . import formula
from .net import SEED, Inputs, Net, UsageError, rotates_neighbors
from .subject import ROWS, Subject

DIM = 128
DEPTH = 2
HEADS = 4
DIM_HEAD = 64
# Half of each head, the library's own default: partial rotation is part of what is checked.
ROTARY_DIM = DIM_HEAD // 2
NUM_TOKENS = 256
SUMMARY = f"{DEPTH} layers, {HEADS} heads of {DIM_HEAD} dims, {ROTARY_DIM} rotated"
TEXT = "pydoc_data.topics"

# Standard deviation of a score is about the square of this, so one key in some hundred gets most of a softmax.
_QUERY_KEY_STD = 1.5
_ANY = 2**31
_NUM_KEYS = 4
_CONTEXT_LEN = 48


def read_text(path: str | None, max_len: int) -> Tensor:
    """The first `max_len` bytes of the file, or of the topics of Python's own help. Raises UsageError without them."""
    try:
        if path is None:
            topics = importlib.import_module(TEXT).topics
            content = "\n".join(topics[name] for name in sorted(topics)).encode()
        else:
            with Path(path).open("rb") as file:
                content = file.read(max_len)
    except OSError as error:
        raise UsageError(f"argument --text: cannot read {path}: {error.strerror}; give a readable file") from None
    except ImportError:
        raise UsageError(f"argument --text: this Python lacks {TEXT}, the default; give --text FILE") from None
    if len(content) < max_len:
        raise UsageError(
            f"argument --max-len: {max_len} is more than the {len(content)} bytes of {path or TEXT}; "
            "give a longer text with --text FILE or a smaller --max-len"
        )
    return torch.tensor(list(content[:max_len]))


class Ours(Subject):
    """One of these models on a device and in a dtype, which reads the text from three places of it on.

    `options` are those of `build`, and `given` says what is passed beside the text, in terms of `Inputs`.
    """

    def __init__(
        self, text: Tensor, device: Any = "cpu", dtype: torch.dtype = torch.float32, given: Any = None, **options: Any
    ) -> None:
        self.main = torch.stack([text.roll(-row * len(text) // ROWS) for row in range(ROWS)])
        net = Net(build(**options).module.to(device, dtype))
        super().__init__(net, Inputs(self.main, **(given or {})).to(net.device, dtype))

    def variant(self, length: int | None = None, dtype: torch.dtype | None = None, **options: Any) -> Ours:
        """The same with further options, another dtype or less text."""
        return Ours(self.main[0, :length], self.net.device, dtype or self.net.dtype, **options)


def additional_kv() -> dict[str, Any]:
    """Keys and values of each layer that are not of the text, and have no position."""
    keys, values = normal(2, DEPTH, 1, HEADS, _NUM_KEYS, DIM_HEAD)
    return {"constant": {"self_attn_additional_kv": list(zip(keys, values))}}


def context(padding: int = 0) -> dict[str, Any]:
    """A context with positions, of which the last `padding` are masked."""
    pos = torch.arange(_CONTEXT_LEN + padding)
    values, mask = normal(len(pos), DIM).expand(ROWS, -1, -1), pos.expand(ROWS, -1) < _CONTEXT_LEN
    return {"per_row": {"context": values, "context_mask": mask}, "constant": {"context_pos": pos}}


def build(*, flash: bool = True, depth: int = DEPTH, **options: Any) -> Net:
    """A byte-level `TransformerWrapper` in eval mode, float32 on the CPU; tokens `(b, n)` to logits `(b, n, 256)`.

    `flash=False` keeps the scores, which `scaled_dot_product_attention` does not give out. `options` are further ones
    of `Decoder`. The same arguments give the same weights, and torch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        sizes = {"dim": DIM, "depth": depth, "heads": HEADS, "attn_dim_head": DIM_HEAD, "rotary_emb_dim": ROTARY_DIM}
        layers = Decoder(**sizes, attn_flash=flash, rotary_xpos=True, **options)
        # neither limits anything
        unlimited = {"max_seq_len": _ANY, "max_mem_len": _ANY, "use_abs_pos_emb": False}
        net = TransformerWrapper(num_tokens=NUM_TOKENS, **unlimited, attn_layers=layers)
        _randomise(net)
    return Net(net.eval())


@torch.no_grad()
def _randomise(net: nn.Module) -> None:
    for parameter in net.parameters():
        if bool(((parameter == 0) | (parameter == 1)).all()):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for attention in (module for module in net.modules() if isinstance(module, Attention)):
        # values as large as the embedding or larger, else the residual stream drowns what attention gives
        for name, std in (("to_q", _QUERY_KEY_STD), ("to_k", _QUERY_KEY_STD), ("to_v", 1), ("to_out", 1)):
            projection = getattr(attention, name)
            projection.weight.normal_(std=std * projection.in_features**-0.5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))


def random_cache(length: int, net: Net) -> LayerIntermediates:
    """A KV cache of `length` unit-normal keys and values for one layer, as if that many tokens had been decoded."""
    keys, values = normal(2, 1, HEADS, length, DIM_HEAD).to(net.device, net.dtype)
    layer = Intermediates(cached_kv=(keys, values))
    cache = LayerIntermediates(attn_intermediates=[layer])
    # set rather than passed: 1.27.5 knows neither
    cache.cache_length, layer.layer_type = length, "a"
    return cache


@dataclass
class Observed:
    """What one layer computed: queries before and after rotation `(heads, i, dim_head)`, scores `(heads, i, j)`.

    `rotated_keys` `(heads, j, dim_head)` are those that the queries met.
    """

    queries: Tensor
    rotated_queries: Tensor
    rotated_keys: Tensor
    scores: Tensor

    def score_error(self, keys: Tensor, query_pos: Tensor, key_pos: Tensor) -> float:
        """How far the scores are from the formula, relative to the largest sum of terms' sizes of each query.

        `keys` `(heads, j, dim_head)` are those before the rotation.
        """
        query_pos, key_pos = query_pos.cpu(), key_pos.cpu()
        q, k = _in_pairs(self.queries), _in_pairs(keys)
        exact, size = formula.scores(q, k, query_pos, key_pos, rotary_dim=ROTARY_DIM)
        error = (self.scores.detach().cpu().double() - exact).abs() / size.amax(dim=-1, keepdim=True)
        error = error[:, query_pos[:, None] >= key_pos]
        return float(error.max()) if bool(error.isfinite().all()) else float("inf")


def _in_pairs(t: Tensor) -> Tensor:
    """Unrotated queries or keys `(..., DIM_HEAD)` with the dims that are rotated together beside each other."""
    if rotates_neighbors():
        return t
    halves = t[..., :ROTARY_DIM].unflatten(-1, (2, -1))
    return torch.cat((halves.transpose(-1, -2).flatten(-2), t[..., ROTARY_DIM:]), dim=-1)


@contextmanager
def observe(net: Net, rows: Tensor) -> Iterator[list[Observed]]:
    """While open, each layer of a model built with `flash=False` notes the given rows of its queries and scores.

    The list is filled by the next call, with a batch of one. The scores are those that the softmax gets, before the
    causal mask. All other rows are let go of at once: `n * n` scores per layer would be what the memory is spent on.
    """
    seen: list[Observed] = []
    queries: list[Tensor] = []

    def note_queries(_module: nn.Module, _args: object, q: Tensor) -> None:
        queries.append(q[0, rows].unflatten(-1, (HEADS, DIM_HEAD)).transpose(0, 1))

    def note_scores(_module: nn.Module, args: Any, output: Any) -> None:
        found = output[1]
        seen.append(Observed(queries.pop(), args[0][0, :, rows], args[1][0], found.qk_similarities[0, :, rows]))
        found.qk_similarities = found.pre_softmax_attn = found.post_softmax_attn = None

    layers = [module for module in net.module.modules() if isinstance(module, Attention)]
    handles = [attention.to_q.register_forward_hook(note_queries) for attention in layers]
    handles += [attention.attend.register_forward_hook(note_scores) for attention in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
