"""Every option of a decoder, and whether xPos keeps what plain rotary has with it.

The options are read from the signatures of `AttentionLayers`, `Attention` (as `attn_*`, and `cross_attn_*` for
cross-attention alone), `FeedForward` (as `ff_*`) and `AttentionLayers.forward` (as `forward.*`), so that one that
upstream adds is `unclassified` until `ENTRIES` says how to turn it on. Some of the wrapper's follow by hand, as
`wrapper.*`.

An option is turned on in two models with the same random weights, one with `rotary_pos_emb=True` and one with
`rotary_xpos=True`, in float64. What is judged is `PROPERTIES`: where plain rotary has one, xPos must have it. There is
no list of exceptions: what is refused with xPos must be, with a message that names it, and plain rotary must run.
"""

from __future__ import annotations

import inspect
import json
import math
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from x_transformers import Attention, Decoder, FeedForward, TransformerWrapper
from x_transformers.x_transformers import AttentionLayers

_BATCH = 2
_LENGTH = 19
_DIM = 16
_DEPTH = 2
_HEADS = 2
_DIM_HEAD = 8
_NUM_TOKENS = 12
_CONTEXT = 5
_CONDITION = 12
# A decay of 0.29 ** (19 / 8) over the sequence: a wrong center shows in the first digit.
_SCALE_BASE = 8

# Shifts of all positions, and how far a row of a batch is from another: far enough that a center common to both
# leaves the range of float64, (1.4 / 0.4) ** (20,000 / 2 / 8) > 1.8e308.
_SHIFTS = (-7, 1, 4_000)
_ROW_SHIFTS = (3, 20_000)
_PADDING = 4

PROPERTIES = MappingProxyType(
    {
        "prefix": "the output at a position is the same however much follows",
        "decode": "one token at a time through the KV cache equals one call for all",
        "chunks": "chunks through the KV cache, without what is in it, equal one call for all",
        "mems": "segments with mems equal one call for all",
        "rows": "a row of a batch gives what it gives alone",
        "shift": "positions passed in and shifted, those of a context with them, change nothing",
        "rowpos": "a shift for each row of the batch changes nothing",
        "pad": "padding on the left, with seq_start_pos, changes nothing",
        "context": "padding a context, masked, changes nothing",
    }
)

# verdicts
HOLDS = "holds"
BROKEN = "broken"
REFUSED = "refused"
PLAIN_FAILS = "plain fails"
NOT_RUN = "not run"


# what is turned on


@dataclass(frozen=True)
class Scene:
    """A call to be made: which rows and positions of the one sequence that all calls are about.

    Positions count from the left padding, if there is any. Those before `new` are in the cache or the mems.
    """

    rows: tuple[int, ...] = tuple(range(_BATCH))
    stop: int = _LENGTH
    new: int = 0
    cached: bool = False
    chunk: bool = False
    mems: bool = False
    shift: Tensor | None = None
    pad: int = 0
    context_pad: int = 0

    def noise(self, name: str, *shape: int) -> Tensor:
        """Unit-normal, `(rows, *shape)`, the same for the same name and shape."""
        return noise(name, _BATCH, *shape)[list(self.rows)]

    def sequence(self, data: Tensor, fill: float = 0) -> Tensor:
        """`data` `(batch, length, ...)` of these rows up to `stop`, behind the left padding."""
        data = data[list(self.rows)]
        padding = data.new_full((data.shape[0], self.pad, *data.shape[2:]), fill)
        return torch.cat((padding, data), dim=1)[:, : self.stop]

    @property
    def first_query(self) -> int:
        """Where what belongs to the queries starts."""
        return self.new if self.cached or self.mems else 0

    @property
    def first_input(self) -> int:
        """Where the tokens that are passed start."""
        return self.new if self.chunk or self.mems else 0


Call = Callable[[nn.Module, Scene], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """One value of an option: keyword arguments of the decoder, of the wrapper, and of each call.

    `needs` and `needs_calls` are what it requires. `inert` says why it changes no output, `float32` which part works
    in float32 whatever the model's dtype, if so. `refused` is what the message must say that refuses it with xPos,
    `fails` the one that refuses it with any rotary, so that there is nothing to compare.
    """

    label: str
    layers: Mapping[str, Any] = field(default_factory=dict)
    wrapper: Mapping[str, Any] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    needs: Mapping[str, Any] = field(default_factory=dict)
    needs_calls: tuple[Call, ...] = ()
    inert: str = ""
    float32: str = ""
    refused: str = ""
    fails: str = ""

    def without(self) -> Setting:
        """What it requires, and no more."""
        return Setting("", needs=self.needs, needs_calls=self.needs_calls)

    @property
    def all_calls(self) -> tuple[Call, ...]:
        return (*self.needs_calls, *(call for call in self.calls if call not in self.needs_calls))

    def decoder(self) -> dict[str, Any]:
        return {**self.needs, **self.layers}


@dataclass(frozen=True)
class Entry:
    """What is known of one option: how to turn it on, or the reason why that is not the question."""

    option: str
    settings: tuple[Setting, ...] = ()
    reason: str = ""
    # not in the release that the fork is made of
    added: bool = False


def combine(*settings: Setting) -> Setting | None:
    """All of them at once, or None if two want different things of one argument.

    It is refused if it contains what an entry says is refused.
    """
    layers: dict[str, Any] = {}
    wrapper: dict[str, Any] = {}
    calls: list[Call] = []
    for setting in settings:
        for merged, arguments in ((layers, setting.decoder()), (wrapper, setting.wrapper)):
            for name, value in arguments.items():
                if name in merged and merged[name] is not value and merged[name] != value:
                    return None
                merged[name] = value
        calls += [call for call in setting.all_calls if call not in calls]
    combined = Setting(
        " + ".join(setting.label for setting in settings),
        layers,
        wrapper,
        tuple(calls),
        float32="; ".join(filter(None, (setting.float32 for setting in settings))),
    )
    refused = (setting for entry in ENTRIES.values() for setting in entry.settings if setting.refused)
    return replace(combined, refused=next((part.refused for part in refused if _contains(combined, part)), ""))


def _contains(whole: Setting, part: Setting) -> bool:
    arguments = whole.decoder()
    return all(arguments.get(name) == value for name, value in part.decoder().items()) and (
        {_kind(call) for call in part.all_calls} <= {_kind(call) for call in whole.all_calls}
    )


def _kind(call: Call) -> Call:
    return next((kind[0] for kind in (_CONTEXTS, _CONTEXT_POSITIONS) if call in kind), call)


# what is passed in calls


def noise(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _condition(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    return {"condition": scene.noise("condition", _CONDITION)}


def _wide_condition(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    return {"condition": scene.noise("condition", _DIM)}


def _condition_per_position(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    data = noise("condition per position", _BATCH, _LENGTH, _CONDITION)
    return {"condition": scene.sequence(data)[:, scene.first_query :]}


def _context(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    return _context_of(scene, _DIM)


def _wide_context(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    return _context_of(scene, _DIM + 4)


def _no_context(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    arguments = _context_of(scene, _DIM)
    return {name: argument[:, _CONTEXT:] for name, argument in arguments.items()}


def _no_context_pos(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    return {"context_pos": _context_pos(_model, scene)["context_pos"][..., _CONTEXT:]}


def _context_of(scene: Scene, dim: int) -> dict[str, Any]:
    context = scene.noise("context", _CONTEXT, dim)
    if not scene.context_pad:
        return {"context": context}
    padding = scene.noise("context padding", scene.context_pad, dim)
    mask = torch.ones(len(scene.rows), _CONTEXT + scene.context_pad, dtype=torch.bool)
    mask[:, _CONTEXT:] = False
    return {"context": torch.cat((context, padding), dim=1), "context_mask": mask}


def _context_mask(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    mask = torch.ones(_BATCH, _CONTEXT + scene.context_pad, dtype=torch.bool)
    mask[1, 1] = False
    mask[:, _CONTEXT:] = False
    return {"context_mask": mask[list(scene.rows)]}


def _context_pos(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    # moved with the queries: to the right by padding on the left, and a segment after mems starts at 0
    pos = torch.arange(_CONTEXT + scene.context_pad) + scene.pad - (scene.new if scene.mems else 0)
    return {"context_pos": pos if scene.shift is None else pos + scene.shift}


def _context_pos_per_row(model: nn.Module, scene: Scene) -> dict[str, Any]:
    pos = _context_pos(model, scene)["context_pos"]
    gaps = torch.tensor([[1], [2]])[list(scene.rows)]
    return {"context_pos": pos + gaps}


def _mask(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.bool)
    mask[1, :3] = False
    whole = scene.sequence(mask)
    if scene.mems:
        return {"mask": whole[:, scene.new :], "mem_masks": [whole[:, : scene.new]] * 9}
    return {"mask": whole}


def _kv_mask(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.bool)
    mask[1, 2] = False
    return {"self_attn_kv_mask": scene.sequence(mask)}


def _attn_mask(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    mask = torch.ones(_LENGTH + scene.pad, _LENGTH + scene.pad, dtype=torch.bool)
    mask[scene.pad :, scene.pad :] = (noise("attention mask", _LENGTH, _LENGTH) < 1).fill_diagonal_(True)
    return {"attn_mask": mask[scene.first_query : scene.stop, : scene.stop]}


def _attn_bias(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    distance = torch.arange(_LENGTH + scene.pad)[:, None] - torch.arange(_LENGTH + scene.pad)
    bias = noise("attention bias", _HEADS, 2 * _LENGTH)[:, distance.clamp(min=0)]
    return {"attn_bias": bias[None, :, scene.first_query : scene.stop, : scene.stop]}


def _seq_start_pos(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    return {"seq_start_pos": torch.tensor([0, 2])[list(scene.rows)] + scene.pad}


def _added_kv(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    layers = [
        tuple(scene.noise(f"added {kind} {layer}", _HEADS, 3, _DIM_HEAD) for kind in "kv") for layer in range(_DEPTH)
    ]
    return {"self_attn_additional_kv": layers}


def _added_kv_of_one_head(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    layers = [tuple(scene.noise(f"added {kind} {layer}", 1, 3, _DIM_HEAD) for kind in "kv") for layer in range(_DEPTH)]
    return {"self_attn_additional_kv": layers}


def _added_kv_of_a_model(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    other = _build(Setting(""), rotary={})
    tokens = (noise("other tokens", _BATCH, 4).abs() * 4).long().clamp(max=_NUM_TOKENS - 1)
    return {"self_attn_additional_kv": other(tokens[list(scene.rows)], return_intermediates=True)[1]}


def _added_kv_mask(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    return {"additional_kv_mask": torch.tensor([[True, True, True], [True, False, True]])[list(scene.rows)]}


def _in_attn_cond(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    return {"in_attn_cond": scene.noise("in-attention condition", _DIM)}


def _self_kv_residuals(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    data = noise("self-attention residuals", _BATCH, _LENGTH, _DIM)
    return {"self_attn_kv_residuals": scene.sequence(data)[:, scene.first_query :]}


def _cross_kv_residuals(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    data = scene.noise("cross-attention residuals", 2 * _CONTEXT, _DIM)[:, : _CONTEXT + scene.context_pad]
    # the keys of the context are in the cache
    return {"cross_attn_kv_residuals": data[:, :0] if scene.cached else data}


def _rotary_table(model: Any, scene: Scene) -> dict[str, Any]:
    rotary = model.attn_layers.rotary_pos_emb
    pos = torch.arange(scene.stop)
    if scene.shift is None:
        return {"rotary_pos_emb": rotary.forward_from_seq_len(scene.stop)}
    pos = pos + scene.shift
    if "seq_len" not in inspect.signature(rotary.forward).parameters:
        return {"rotary_pos_emb": rotary(pos)}
    return {"rotary_pos_emb": rotary(pos, offset=pos.amin(dim=-1, keepdim=True), seq_len=scene.stop)}


def _window(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    if scene.shift is not None and scene.shift.numel() > 1:  # rows that far apart have no window in common
        return {}
    # each shard has the window of the whole sequence
    start = 0 if scene.shift is None else int(scene.shift)
    return {"rotary_window": (start, _LENGTH + scene.pad)}


def _transform(block: int, x: Tensor) -> Tensor:
    return x * (1 + block / 8)


def _prepended(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    # not before the chunks and segments that follow the first
    return {} if scene.first_input else {"prepend_embeds": scene.noise("prepended", 3, _DIM)}


def _sum_embeds(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    data = noise("summed embeddings", _BATCH, _LENGTH, _DIM)
    return {"sum_embeds": scene.sequence(data)[:, scene.first_input :]}


def _embed_ids(_model: nn.Module, scene: Scene) -> dict[str, Any]:
    return {"embed_ids": {"kind": (scene.sequence(noise("kinds", _BATCH, _LENGTH)) > 0).long()[:, scene.first_input :]}}


class _Constant:
    """The same keyword arguments for every call."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments

    def __call__(self, _model: nn.Module, _scene: Scene) -> dict[str, Any]:
        return self.arguments


class _Recurrent(nn.Module):
    """Something to mix with attention."""

    def __init__(self) -> None:
        super().__init__()
        # made on import, which must leave torch's random state as it is
        with torch.random.fork_rng(devices=[]):
            self.gru = nn.GRU(_DIM, _HEADS * _DIM_HEAD, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.gru(x, hidden)
        return out


# the entries


def _label(value: Any) -> str:
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, dict):
        return ", ".join(f"{name}={_label(content)}" for name, content in value.items())
    return value.__name__ if callable(value) and hasattr(value, "__name__") else str(value)


def _on(
    option: str,
    *values: Any,
    needs: Mapping[str, Any] | None = None,
    calls: tuple[Call, ...] = (),
    inert: str = "",
    float32: str = "",
    refused: str = "",
    fails: str = "",
) -> Entry:
    """An option of the decoder that is turned on by each of `values`."""
    settings = (
        Setting(
            _label(value),
            {option: value},
            needs=needs or {},
            needs_calls=calls,
            inert=inert,
            float32=float32,
            refused=refused,
            fails=fails,
        )
        for value in values or (True,)
    )
    return Entry(option, tuple(settings))


def _call(option: str, *settings: Setting, **how: Any) -> Entry:
    return Entry(f"forward.{option}", settings, **how)


_softmax = partial(torch.softmax, dim=-1)
_over_queries = partial(torch.softmax, dim=-2)
_SOFTMAX = MappingProxyType({"attn_custom_attn_fn": _softmax})
# such an attention function is not used where a custom one is given
_OWN_FUNCTION = MappingProxyType({"attn_custom_attn_fn": None})
_FLASH = MappingProxyType({"attn_flash": True, "attn_custom_attn_fn": None})
_CROSS = MappingProxyType({"cross_attend": True})
_CONTEXTS: tuple[Call, ...] = (_context, _wide_context, _no_context)
_CONTEXT_POSITIONS: tuple[Call, ...] = (_context_pos, _context_pos_per_row, _no_context_pos)
_CROSS_CALLS: tuple[Call, ...] = (_context, _context_pos)
_ADAPTIVE = MappingProxyType({"use_adaptive_layernorm": True, "dim_condition": _CONDITION})
_STREAMS = MappingProxyType({"num_residual_streams": 2})
_GATED_STREAMS = MappingProxyType(
    {"gated_multi_residual": True, "num_residual_streams": 2, "residual_fn_kwargs": {"read_gate_rank": 4}}
)
_LATENT_KV = MappingProxyType({"attn_use_latent_kv": True, "attn_dim_latent_kv": 12})
_ALIBI = MappingProxyType({"alibi_pos_bias": True})

_RANDOMISED = "an initial value, and the survey makes all parameters random"
_TRAINING = "for training only"
GIVEN = "given by AttentionLayers from what it is given itself, and an error if passed as well"
_COMPARED = "what is compared: plain rotary and xPos"
_POSITIONS = "the properties vary it"
_BUFFERS = "the properties pass it"
_GPU = "needs the library flash-attn and a GPU"
_KERNEL = "the same attention, by another kernel"


def _entries() -> Iterator[Entry]:
    # AttentionLayers: the shape
    yield _on("dim", 24)
    yield _on("depth", 1, 3)
    yield Entry("heads", (Setting("1", {"heads": 1, "attn_dim_head": _DIM}), Setting("4", {"heads": 4})))
    yield _on("causal", False, refused="bidirectional")
    yield Entry(
        "cross_attend",
        (
            Setting("True", _CROSS, calls=(_context,)),
            Setting("True, context_pos", _CROSS, calls=(_context, _context_pos)),
        ),
    )
    yield _on("only_cross", needs=_CROSS, calls=_CROSS_CALLS)
    yield _on("only_attn")

    # norms
    yield _on("use_scalenorm")
    yield _on("use_rmsnorm")
    yield _on("use_dynamic_tanh")
    yield _on("use_derf")
    yield _on("dynamic_tanh_init_alpha", 0.5, needs={"use_dynamic_tanh": True})
    yield _on("use_simple_rmsnorm")
    yield Entry("use_adaptive_layernorm", (Setting("True", _ADAPTIVE, calls=(_condition,)),))
    yield Entry(
        "use_adaptive_rmsnorm",
        (Setting("True", {"use_adaptive_rmsnorm": True, "dim_condition": _CONDITION}, calls=(_condition,)),),
    )
    yield Entry(
        "use_adaptive_layerscale",
        (Setting("True", {"use_adaptive_layerscale": True, "dim_condition": _CONDITION}, calls=(_condition,)),),
    )
    yield _on("norm_add_unit_offset", False)
    yield Entry("dim_condition", (Setting(str(_DIM), {**_ADAPTIVE, "dim_condition": _DIM}, calls=(_wide_condition,)),))
    yield _on("adaptive_condition_mlp", needs=_ADAPTIVE, calls=(_condition,))
    yield _on(
        "adaptive_condition_mlp_expansion",
        2,
        needs={**_ADAPTIVE, "adaptive_condition_mlp": True},
        calls=(_condition,),
    )

    # positions beside rotary
    yield _on("alibi_pos_bias")
    yield _on("alibi_num_heads", 1, needs=_ALIBI)
    # a default of positions, made for rotary, is taken for custom ones
    only_alibi = "only alibi allowed for custom positions"
    yield _on("rel_pos_bias", fails=only_alibi)
    yield _on("rel_pos_num_buckets", 8, needs={"rel_pos_bias": True}, fails=only_alibi)
    yield _on("rel_pos_max_distance", 64, needs={"rel_pos_bias": True}, fails=only_alibi)
    yield _on("dynamic_pos_bias", fails=only_alibi)
    yield _on("dynamic_pos_bias_log_distance", needs={"dynamic_pos_bias": True}, fails=only_alibi)
    yield _on("dynamic_pos_bias_mlp_depth", 3, needs={"dynamic_pos_bias": True}, fails=only_alibi)
    yield _on("dynamic_pos_bias_norm", needs={"dynamic_pos_bias": True}, fails=only_alibi)
    yield _on("rel_pos_kwargs", {"slopes": [0.5, 0.3]}, needs=_ALIBI)
    yield _on("polar_pos_emb", fails="either rotary positional embedding or polar")
    yield _on(
        "polar_bias_uniform_init", needs={"polar_pos_emb": True}, fails="either rotary positional embedding or polar"
    )
    yield _on("disable_abs_pos_emb", False)

    # rotary itself
    yield Entry("rotary_pos_emb", reason=_COMPARED)
    yield Entry("rotary_xpos", reason=_COMPARED)
    yield _on("rotary_emb_dim", 4, 8)
    yield _on("rotary_interpolation_factor", 2.5)
    yield _on("rotary_xpos_scale_base", 4, 32, 512)
    yield _on("rotary_base_rescale_factor", 4.0)
    yield _on("rotate_num_heads", 1)

    # which layers there are, and in which order
    yield _on("weight_tie_layers")
    yield _on("custom_layers", ("a", "a", "f", "f"))
    yield _on("layers_execute_order", (0, 1, 2, 3, 0, 1))
    yield _on("sandwich_coef", 1)
    yield _on("par_ratio", 2)
    yield _on("macaron")
    yield _on("unet_skips", needs={"depth": 3})

    # residuals
    yield _on("residual_attn")
    yield _on("cross_residual_attn", needs=_CROSS, calls=_CROSS_CALLS)
    yield _on("pre_norm", False)
    yield _on("pre_norm_has_final_norm", False)
    yield _on("pre_and_post_norm")
    yield _on("sandwich_norm")
    yield _on("attn_aggregated_residuals", needs={"attn_aggregated_residual_kwargs": {"lora_rank": 4}})
    yield _on(
        "attn_aggregated_residual_kwargs",
        {"lora_rank": 4, "lora_activation": nn.SiLU()},
        needs={"attn_aggregated_residuals": True},
    )
    yield _on("gate_residual")
    yield _on("orthog_residual")
    yield _on("mv_split_residual")
    yield Entry("gated_multi_residual", (Setting("True", _GATED_STREAMS),))
    yield _on("scale_residual")
    yield _on("scale_residual_constant", 0.5)
    yield _on("depth_scale_residual", 0.7)
    yield _on("residual_fn_kwargs", {"learned": True}, needs={"mv_split_residual": True})
    yield _on("num_residual_streams", 2)
    yield _on(
        "hyper_conn_sinkhorn_iters",
        2,
        needs=_STREAMS,
        inert="upstream normalises one weight at a time, which makes it 1",
    )
    yield Entry(
        "qkv_receive_diff_residuals",
        (
            Setting("True", {"qkv_receive_diff_residuals": True}, needs=_STREAMS),
            Setting("True, gated", {"qkv_receive_diff_residuals": True}, needs=_GATED_STREAMS),
            Setting("True, LIMe", {"qkv_receive_diff_residuals": True, "integrate_layers": True}),
        ),
    )
    yield _on("integrate_layers")
    yield _on("layer_integrate_use_softmax", False, needs={"integrate_layers": True})
    yield _on("reinject_input")
    yield _on("learned_reinject_input_gate", needs={"reinject_input": True})
    yield _on("add_value_residual")
    yield _on("learned_value_residual_mix", False, needs={"add_value_residual": True})

    # between layers
    yield _on("shift_tokens", 1)
    yield _on("softclamp_output")
    yield _on("softclamp_output_value", 2.0, needs={"softclamp_output": True})
    yield _on("use_layerscale")
    yield _on("layerscale_init_value", 0.5, needs={"use_layerscale": True}, inert=_RANDOMISED)
    yield _on("zero_init_branch_output", inert=_RANDOMISED)
    yield _on("layer_dropout", 0.5, inert=_TRAINING)
    yield _on("cross_attn_tokens_dropout", 0.5, needs=_CROSS, calls=_CROSS_CALLS, inert=_TRAINING)
    yield _on("verbose", True, inert="what is logged when the model is built")

    # Attention: the shape
    for name in ("dim", "heads", "causal", "qkv_receive_diff_residuals", "learned_value_residual_mix"):
        yield Entry(f"attn_{name}", reason=GIVEN)
    for name in ("rotate_num_heads", "output_proj_depth"):
        yield Entry(f"attn_{name}", reason=GIVEN)
    yield _on("attn_dim_head", 12)
    yield Entry(
        "attn_dim_context",
        (
            Setting(
                str(_DIM + 4), {"cross_attn_dim_context": _DIM + 4}, needs=_CROSS, calls=(_wide_context, _context_pos)
            ),
        ),
    )
    yield _on("attn_value_dim_head", 12)
    yield _on("attn_dim_out", _DIM, inert="no other than the model's own fits the residual stream")
    yield _on("attn_project_out", False)
    yield _on("attn_kv_heads", 1, 2, needs={"heads": 4})
    yield _on("attn_one_kv_head")

    # how attention is computed
    yield Entry("attn_flash", (Setting("True", _FLASH, inert=_KERNEL),))
    yield _on("attn_attend_sdp_kwargs", {"enable_math": True}, needs=_FLASH, inert=_KERNEL)
    yield Entry("attn_flash_pack_seq", reason=_GPU)
    yield _on("attn_onnxable", inert="the same mask, made in another way")
    yield _on("attn_custom_attn_fn", None, float32="the softmax works in float32", inert="the softmax, in float32")
    yield _on("attn_hard", needs=_OWN_FUNCTION)
    yield _on("attn_sigmoid", needs=_OWN_FUNCTION)
    yield _on("attn_sparse_topk", 2, needs=_OWN_FUNCTION)
    yield _on("attn_sparse_topk_straight_through", needs={**_OWN_FUNCTION, "attn_sparse_topk": 2}, inert=_TRAINING)
    yield _on("attn_gumbel_softmax", needs=_OWN_FUNCTION)
    gumbel = {**_OWN_FUNCTION, "attn_gumbel_softmax": True}
    yield _on("attn_gumbel_softmax_temp", 0.5, needs={**gumbel, "attn_gumbel_softmax_hard": False})
    yield _on("attn_gumbel_softmax_hard", False, needs=gumbel)
    yield _on("attn_pre_talking_heads")
    yield _on("attn_post_talking_heads")
    yield _on("attn_pre_scale_post_talking_heads")
    yield _on("attn_softclamp_logits")
    yield _on("attn_logit_softclamp_value", 2.0, needs={"attn_softclamp_logits": True})
    yield _on("attn_selective")
    yield _on("attn_cog_signed")
    yield Entry(
        "attn_inverted_attention",
        (
            Setting(
                "True",
                {"cross_attn_inverted_attention": True, "cross_attn_custom_attn_fn": _over_queries},
                needs=_CROSS,
                needs_calls=_CROSS_CALLS,
            ),
        ),
    )
    yield _on("attn_max_attend_past", 2)
    yield _on("attn_laser")
    yield _on("attn_laser_softclamp_value", 2.0, needs={"attn_laser": True})

    # keys without a position
    yield _on("attn_num_mem_kv", 3)
    yield _on("attn_add_zero_kv")
    yield _on("attn_head_learned_sink")

    # queries, keys and values
    yield _on("attn_qk_norm", True, (True, False))
    yield _on("attn_qk_norm_groups", 2, needs={"attn_qk_norm": True})
    yield _on("attn_qk_norm_scale", 4, needs={"attn_qk_norm": True})
    yield _on("attn_qk_norm_dim_scale", needs={"attn_qk_norm": True})
    yield _on("attn_qk_rmsnorm")
    yield _on("attn_k_rmsnorm")
    yield _on("attn_value_rmsnorm")
    yield _on("attn_use_latent_q", needs={"attn_dim_latent_q": 12})
    yield _on("attn_dim_latent_q", 12, needs={"attn_use_latent_q": True})
    yield _on("attn_use_latent_kv", needs={"attn_dim_latent_kv": 12})
    yield _on("attn_dim_latent_kv", 12, needs={"attn_use_latent_kv": True})
    yield _on("attn_latent_rope_subheads", 1, needs=_LATENT_KV)

    # what comes out
    yield _on("attn_head_scale")
    yield _on("attn_on_attn")
    yield _on("attn_gate_value_heads")
    yield _on("attn_gate_values")
    yield _on("attn_swiglu_values", needs={"attn_gate_values": True})
    yield _on("attn_gate_values_rank", 4, needs={"attn_gate_values": True})
    yield _on("attn_gate_values_headwise", needs={"attn_gate_values": True})
    yield _on("attn_output_gate")
    yield _on("attn_output_gate_rank", 4, needs={"attn_output_gate": True})
    yield _on("attn_output_gate_headwise", needs={"attn_output_gate": True})
    yield _on("attn_low_rank_silu_gates", False, needs={"attn_gate_values": True, "attn_gate_values_rank": 4})
    yield _on("attn_orthog_projected_values")
    yield _on("attn_orthog_projected_values_per_head")
    hybrid = {
        "attn_hybrid_module": _Recurrent(),
        "attn_hybrid_fold_axial_dim": 1,
    }
    yield Entry("attn_hybrid_module", (Setting("a GRU", hybrid),))
    yield Entry("attn_hybrid_fold_axial_dim", (Setting("2", {**hybrid, "attn_hybrid_fold_axial_dim": 2}),))
    yield _on("attn_hybrid_learned_mix", needs=hybrid)
    yield _on("attn_hybrid_mask_kwarg", "mask", needs=hybrid, inert="only used if not causal")

    # positions beside rotary
    yield _on("attn_data_dependent_alibi")
    per_row = {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_per_row": True}
    yield _on("attn_data_dependent_alibi_per_row", needs={"attn_data_dependent_alibi": True})
    yield _on("attn_data_dependent_alibi_per_row_dim_head", 4, needs=per_row)
    yield _on("attn_data_dependent_alibi_kwargs", {"post_log_scale": 0.5}, needs={"attn_data_dependent_alibi": True})
    yield _on("attn_use_rel_proj_pos_bias")
    yield _on("attn_rel_proj_num_distance_basis", 4, needs={"attn_use_rel_proj_pos_bias": True})
    yield _on("attn_rel_proj_max_dist", 8, needs={"attn_use_rel_proj_pos_bias": True})

    # refused
    yield _on("attn_l2_distance", refused="attn_l2_distance")
    yield _on("attn_use_cope", refused="attn_use_cope")
    for name, value in (("cope_max_pos", 4), ("cope_soft_onehot_pos", True), ("cope_talking_heads", True)):
        yield _on(f"attn_{name}", value, needs={"attn_use_cope": True}, refused="attn_use_cope")

    yield _on("attn_dropout", 0.5, inert=_TRAINING)
    yield _on("attn_sublayer_dropout", 0.5, inert=_TRAINING)
    yield _on("attn_zero_init_output", inert=_RANDOMISED)

    # FeedForward
    yield Entry("ff_dim", reason=GIVEN)
    yield Entry("ff_output_proj_depth", reason=GIVEN)
    yield _on("ff_dim_out", _DIM, inert="no other than the model's own fits the residual stream")
    yield _on("ff_mult", 2)
    yield _on("ff_glu")
    yield _on("ff_glu_mult_bias", needs={"ff_glu": True})
    yield _on("ff_swish")
    yield _on("ff_relu_squared")
    yield _on("ff_solu")
    yield _on("ff_custom_activation", nn.Tanh())
    yield _on("ff_post_act_ln")
    yield _on("ff_no_bias")
    yield _on("ff_softclamp_value", 2.0)
    yield _on("ff_glu_softclamp", needs={"ff_glu": True})
    yield _on("ff_glu_gate_softclamp_value", 1.0, needs={"ff_glu": True, "ff_glu_softclamp": True})
    yield _on("ff_glu_up_softclamp_value", 1.0, needs={"ff_glu": True, "ff_glu_softclamp": True})
    yield _on("ff_dropout", 0.5, inert=_TRAINING)
    yield _on("ff_sublayer_dropout", 0.5, inert=_TRAINING)
    yield _on("ff_zero_init_output", inert=_RANDOMISED)

    # AttentionLayers.forward
    yield _call(
        "context",
        Setting("(b, m, d)", calls=(_context,), needs=_CROSS),
        Setting("(b, 0, d), num_mem_kv", {"attn_num_mem_kv": 3}, calls=(_no_context, _no_context_pos), needs=_CROSS),
    )
    yield _call("context_mask", Setting("(b, m)", calls=(_context_mask,), needs=_CROSS, needs_calls=_CROSS_CALLS))
    yield _call(
        "context_pos",
        Setting("(m,)", calls=(_context_pos,), needs=_CROSS, needs_calls=(_context,)),
        Setting("(b, m)", calls=(_context_pos_per_row,), needs=_CROSS, needs_calls=(_context,)),
        Setting(
            "(m,), num_mem_kv", {"attn_num_mem_kv": 3}, calls=(_context_pos,), needs=_CROSS, needs_calls=(_context,)
        ),
    )
    yield _call("mask", Setting("(b, n)", calls=(_mask,)))
    yield _call("attn_mask", Setting("(n, n)", calls=(_attn_mask,)))
    yield _call(
        "self_attn_kv_mask", Setting("(b, n)", calls=(_kv_mask,)), Setting("(b, n), flash", _FLASH, calls=(_kv_mask,))
    )
    yield _call("mems", reason=_BUFFERS)
    yield _call("mem_masks", Setting("(b, n)", calls=(_mask,)))
    yield _call("seq_start_pos", Setting("(b,)", calls=(_seq_start_pos,)))
    for name in ("seq_pos_offset", "pos"):
        yield _call(name, reason=_POSITIONS)
    for name in ("cache", "input_not_include_cache", "cache_age"):
        yield _call(name, reason=_BUFFERS)
    yield _call("return_hiddens", reason="the wrapper passes it")
    yield _call(
        "return_gumbel_log_probs",
        Setting("True", calls=(_Constant(return_gumbel_log_probs=True),), inert="what else is returned"),
    )
    yield _call(
        "rotary_pos_emb",
        Setting("table", calls=(_rotary_table,), inert="the same as without"),
        Setting(
            "table, context_pos",
            calls=(_rotary_table,),
            needs=_CROSS,
            needs_calls=_CROSS_CALLS,
            refused="`context_pos` and `rotary_window` need `pos` instead of `rotary_pos_emb`",
        ),
    )
    yield _call("polar_pos_emb", reason="of polar_pos_emb")
    yield _call("attn_bias", Setting("(1, h, i, j)", calls=(_attn_bias,)))
    yield _call("deep_embeds_and_ids", Setting("ff_deep_embed", wrapper={"ff_deep_embed": True}))
    yield _call(
        "self_attn_additional_kv",
        Setting("tuples", calls=(_added_kv,)),
        Setting("tuples of one head", calls=(_added_kv_of_one_head,)),
        Setting("of a model", calls=(_added_kv_of_a_model,)),
        Setting("tuples, num_mem_kv", {"attn_num_mem_kv": 2}, calls=(_added_kv,)),
    )
    yield _call("additional_kv_mask", Setting("(b, m)", calls=(_added_kv_mask,), needs_calls=(_added_kv,)))
    yield _call(
        "detach_additional_kv",
        Setting("True", calls=(_Constant(detach_additional_kv=True),), needs_calls=(_added_kv,), inert=_TRAINING),
    )
    yield _call(
        "route_additional_kv_to_top",
        Setting(
            "False", calls=(_Constant(route_additional_kv_to_top=False),), needs={"depth": 3}, needs_calls=(_added_kv,)
        ),
    )
    yield _call(
        "condition",
        Setting("(b, d)", _ADAPTIVE, calls=(_condition,)),
        Setting("(b, n, d)", _ADAPTIVE, calls=(_condition_per_position,)),
    )
    yield _call("in_attn_cond", Setting("(b, d)", calls=(_in_attn_cond,)))
    yield _call(
        "layers_execute_order", Setting("(0, 1, 0, ...)", calls=(_Constant(layers_execute_order=(0, 1, 0, 1, 2, 3)),))
    )
    yield _call("repeat_blocks", Setting("(1, 2)", calls=(_Constant(repeat_blocks=(1, 2)),)))
    yield _call("self_attn_kv_residuals", Setting("(b, n, d)", calls=(_self_kv_residuals,)))
    yield _call(
        "cross_attn_kv_residuals",
        Setting("(b, m, d)", calls=(_cross_kv_residuals,), needs=_CROSS, needs_calls=_CROSS_CALLS),
    )
    yield _call("flash_pack_seq_kwargs", reason=_GPU)
    yield _call("flash_pack_seq_context_kwargs", reason=_GPU)
    yield _call(
        "causal",
        Setting("True", calls=(_Constant(causal=True),), inert="a decoder is causal"),
        Setting("False", calls=(_Constant(causal=False),), refused="`causal = False`"),
    )
    yield _call("transform_block_inputs", Setting("callable", calls=(_Constant(transform_block_inputs=_transform),)))
    yield _call("rotary_window", Setting("all", calls=(_window,), inert="it only moves the center"), added=True)

    # some of the wrapper's
    yield Entry(
        "wrapper.num_memory_tokens",
        (
            Setting("2", wrapper={"num_memory_tokens": 2}),
            Setting("2, interspersed", wrapper={"num_memory_tokens": 2, "memory_tokens_interspersed_every": 4}),
        ),
    )
    yield Entry(
        "wrapper.embed_num_tokens", (Setting("2", wrapper={"embed_num_tokens": {"kind": 2}}, calls=(_embed_ids,)),)
    )
    yield Entry("wrapper.shift_mem_down", (Setting("1", wrapper={"shift_mem_down": 1}, inert="only moves mems"),))
    yield Entry(
        "wrapper.recycling", (Setting("True", wrapper={"recycling": True}, calls=(_Constant(recycle_steps=2),)),)
    )
    looped = Setting(
        "True", wrapper={"looped": True}, needs={"pre_and_post_norm": True}, calls=(_Constant(looped_steps=2),)
    )
    yield Entry("wrapper.looped", (looped,))
    yield Entry("wrapper.forward.prepend_embeds", (Setting("(b, 3, d)", calls=(_prepended,)),))
    yield Entry("wrapper.forward.sum_embeds", (Setting("(b, n, d)", calls=(_sum_embeds,)),))
    yield Entry("wrapper.forward.return_attn", (Setting("True", calls=(_Constant(return_attn=True),)),))


def _of_cross_attention(entry: Entry) -> Entry:
    """The same option of cross-attention alone, whose context has positions."""
    option = f"cross_{entry.option}"
    if option == "cross_attn_l2_distance":
        # without positions of the context its queries and keys are not rotated
        of_context = Setting("True", {option: True}, needs=_CROSS, needs_calls=(_context,))
        with_positions = replace(
            of_context, label="True, context_pos", needs_calls=_CROSS_CALLS, refused="cross_attn_l2_distance"
        )
        return Entry(option, (of_context, with_positions))
    if entry.option in _NOT_GIVEN:
        needs, value, fails = _NOT_GIVEN[entry.option]
        label = str(value)
        setting = Setting(label, {option: value}, needs={**_CROSS, **needs}, needs_calls=_CROSS_CALLS, fails=fails)
        return Entry(option, (setting,))
    settings = []
    for setting in entry.settings:
        calls = () if any(call in setting.all_calls for call in _CONTEXTS) else _CROSS_CALLS
        cross = replace(
            setting,
            layers=_for_cross_attention(setting.layers),
            needs={**_for_cross_attention(setting.needs), **_CROSS},
            needs_calls=(*setting.needs_calls, *calls),
        )
        if entry.option in _ONLY_SELF:
            cross = replace(cross, refused="", fails=_ONLY_SELF[entry.option])
        settings.append(cross)
    return replace(entry, option=option, settings=tuple(settings))


def _for_cross_attention(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {f"cross_{name}" if name.startswith("attn_") else name: value for name, value in arguments.items()}


# what plain rotary cannot have in cross-attention either, and what it says
_ONLY_SELF: Mapping[str, str] = MappingProxyType(
    {
        "attn_selective": "designed for autoregressive",
        # as many values as queries
        "attn_orthog_projected_values": "must match the size",
        "attn_orthog_projected_values_per_head": "must match the size",
        "attn_data_dependent_alibi": "must match the size",
        "attn_data_dependent_alibi_kwargs": "must match the size",
        "attn_data_dependent_alibi_per_row": "bidirectional not supported",
        "attn_data_dependent_alibi_per_row_dim_head": "bidirectional not supported",
        "attn_use_cope": "designed for causal attention",
        "attn_cope_max_pos": "designed for causal attention",
        "attn_cope_soft_onehot_pos": "designed for causal attention",
        "attn_cope_talking_heads": "designed for causal attention",
    }
)


# what AttentionLayers gives to self-attention alone: what it needs, a value, and what plain rotary says if it fails
_NOT_GIVEN: Mapping[str, tuple[Mapping[str, Any], Any, str]] = MappingProxyType(
    {
        "attn_causal": ({}, True, ""),
        "attn_qkv_receive_diff_residuals": ({}, True, "can only be used for self attention"),
        # one weight per query for the values of the context
        "attn_learned_value_residual_mix": ({"add_value_residual": True}, True, "must match the size"),
        "attn_rotate_num_heads": ({}, 1, ""),
    }
)


def _all_entries() -> Iterator[Entry]:
    of_attention = {f"attn_{name}" for name in _parameters(Attention)}
    for entry in _entries():
        yield entry
        if entry.option in of_attention:
            yield _of_cross_attention(entry)


def _parameters(owner: type, method: str = "__init__") -> list[str]:
    parameters = inspect.signature(getattr(owner, method)).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [parameter.name for parameter in parameters if parameter.name != "self" and parameter.kind not in variadic]


ENTRIES: Mapping[str, Entry] = MappingProxyType({entry.option: entry for entry in _all_entries()})


def options(
    layers: type = AttentionLayers, attention: type = Attention, feedforward: type = FeedForward
) -> tuple[str, ...]:
    """The names of all options, from the signatures."""
    found = [
        *_parameters(layers),
        *(f"{prefix}attn_{name}" for name in _parameters(attention) for prefix in ("", "cross_")),
        *(f"ff_{name}" for name in _parameters(feedforward)),
        *(f"forward.{name}" for name in _parameters(layers, "forward") if name != "x"),
    ]
    return tuple(dict.fromkeys(found))


def unclassified(
    layers: type = AttentionLayers, attention: type = Attention, feedforward: type = FeedForward
) -> list[str]:
    """The options that no entry is about."""
    return [name for name in options(layers, attention, feedforward) if name not in ENTRIES]


def stale() -> list[str]:
    """The entries about what is no option."""
    known = {
        *options(),
        *(f"wrapper.{name}" for name in _parameters(TransformerWrapper)),
        *(f"wrapper.forward.{name}" for name in _parameters(TransformerWrapper, "forward")),
    }
    return [name for name, entry in ENTRIES.items() if name not in known and not entry.added]


# models


PLAIN: Mapping[str, Any] = MappingProxyType({"rotary_pos_emb": True})
XPOS: Mapping[str, Any] = MappingProxyType({"rotary_xpos": True, "rotary_xpos_scale_base": _SCALE_BASE})


def _build(setting: Setting, rotary: Mapping[str, Any]) -> nn.Module:
    decoder = {
        "dim": _DIM,
        "depth": _DEPTH,
        "heads": _HEADS,
        "attn_dim_head": _DIM_HEAD,
        # some of each head is not rotated
        "rotary_emb_dim": 6,
        # the default one works in float32, which would put a floor under what float64 can tell
        **_SOFTMAX,
        "verbose": False,
        **rotary,
        **setting.decoder(),
    }
    layers = AttentionLayers if "causal" in decoder else Decoder
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = TransformerWrapper(
            num_tokens=_NUM_TOKENS, max_seq_len=64, max_mem_len=64, attn_layers=layers(**decoder), **setting.wrapper
        )
    model = model.double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # each drawn by its name, so that models that differ in one parameter share the others; all of them, since one
        # that starts at zero or one would hide what multiplies it; large enough that attention is far from uniform
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
        parameter.copy_(noise(name, *parameter.shape) * (2 / fan_in) ** 0.5)
    return model


class Run:
    """A model with a setting; calls it for scenes."""

    def __init__(self, setting: Setting, rotary: Mapping[str, Any]) -> None:
        self.setting = setting
        self.model: Any = _build(setting, rotary)
        self.tokens = (noise("tokens", _BATCH, _LENGTH).abs() * 5).long().clamp(max=_NUM_TOKENS - 1)
        self.full = self(Scene())[0]

    @torch.no_grad()
    def __call__(self, scene: Scene, cache: Any = None, mems: Any = None) -> tuple[Tensor, Any]:
        """Outputs of the positions from `new` on, and the intermediates."""
        return self.forward(scene, cache, mems)

    def forward(self, scene: Scene, cache: Any = None, mems: Any = None) -> tuple[Tensor, Any]:
        """The same, with gradients if the model's parameters have them."""
        arguments: dict[str, Any] = {"return_intermediates": True, "return_mems": True, "mems": mems}
        if cache is not None:
            arguments.update(cache=cache, cache_age=scene.stop - scene.new, input_not_include_cache=scene.chunk)
        if scene.pad:
            arguments["seq_start_pos"] = torch.full((len(scene.rows),), scene.pad)
        for call in self.setting.all_calls:
            arguments.update(call(self.model, scene))
        tokens = scene.sequence(self.tokens, fill=1)[:, scene.first_input :]
        if scene.shift is not None:
            arguments["pos"] = torch.arange(self._positions(tokens.shape[1], arguments)) + scene.shift
        if not scene.mems:
            arguments.pop("mem_masks", None)
        with_attention = arguments.pop("return_attn", False)

        with torch.random.fork_rng(devices=[]):
            # for attention that draws at random
            torch.manual_seed(0)
            out, intermediates = self.model(tokens, **arguments)
        if with_attention:
            out = torch.cat([out, *self._digests(intermediates, scene)], dim=-1)
        out = out[:, scene.new - scene.stop :]
        if "seq_start_pos" in arguments:
            # what comes out of padding means nothing
            padding = torch.arange(scene.new, scene.stop) < arguments["seq_start_pos"][:, None]
            out = out.masked_fill(padding[..., None], 0)
        return out, intermediates

    def _positions(self, length: int, arguments: Mapping[str, Any]) -> int:
        """How many positions the wrapper makes of `length` tokens."""
        blocks, every, num_memory_tokens = 1, self.model.memory_tokens_interspersed_every, self.model.num_memory_tokens
        assert isinstance(num_memory_tokens, int)
        if every is not None:
            blocks = math.ceil(length / every)
            length = blocks * every
        prepended = arguments.get("prepend_embeds")
        return length + blocks * num_memory_tokens + (0 if prepended is None else prepended.shape[1])

    @staticmethod
    def _digests(intermediates: Any, scene: Scene) -> Iterator[Tensor]:
        """The attention of each query, as a random combination of its weights `(b, i, h)`: the same if they are."""
        for layer in intermediates.attn_intermediates:
            weights = layer.post_softmax_attn
            random = noise("digest", 64)[: weights.shape[-1] - scene.pad]
            yield (weights @ torch.cat((torch.zeros(scene.pad, dtype=random.dtype), random))).transpose(1, 2)


# the properties: each yields two outputs that must be the same

Pairs = Iterator[tuple[Tensor, Tensor]]


def _prefix(run: Run) -> Pairs:
    for stop in (2, 9, 14):
        yield run(Scene(stop=stop))[0], run.full[:, :stop]


def _decode(run: Run) -> Pairs:
    out, cache = run(Scene(stop=5))
    yield out, run.full[:, :5]
    for stop in range(6, _LENGTH + 1):
        out, cache = run(Scene(stop=stop, new=stop - 1, cached=True), cache=cache)
        yield out, run.full[:, stop - 1 : stop]


def _chunks(run: Run) -> Pairs:
    start, cache = 0, None
    for size in (5, 1, 7, 6):
        scene = Scene(stop=start + size, new=start, cached=cache is not None, chunk=True)
        out, cache = run(scene, cache=cache)
        yield out, run.full[:, start : start + size]
        start += size


def _mems(run: Run) -> Pairs:
    start, mems = 0, None
    for size in (6, 9, 4):
        scene = Scene(stop=start + size, new=start, mems=mems is not None)
        out, intermediates = run(scene, mems=mems)
        mems = intermediates.mems
        yield out, run.full[:, start : start + size]
        start += size


def _rows(run: Run) -> Pairs:
    for row in range(_BATCH):
        yield run(Scene(rows=(row,)))[0], run.full[row : row + 1]


def _shift(run: Run) -> Pairs:
    for shift in _SHIFTS:
        yield run(Scene(shift=torch.tensor(shift)))[0], run.full


def _row_shift(run: Run) -> Pairs:
    yield run(Scene(shift=torch.tensor(_ROW_SHIFTS)[:, None]))[0], run.full


def _pad(run: Run) -> Pairs:
    yield run(Scene(stop=_LENGTH + _PADDING, new=_PADDING, pad=_PADDING))[0], run.full


def _pad_context(run: Run) -> Pairs:
    yield run(Scene(context_pad=4))[0], run.full


MEASURES: Mapping[str, Callable[[Run], Pairs]] = MappingProxyType(
    dict(zip(PROPERTIES, (_prefix, _decode, _chunks, _mems, _rows, _shift, _row_shift, _pad, _pad_context)))
)


@dataclass(frozen=True)
class Measured:
    """The largest deviation, None where `error` was raised, and what rounding explains."""

    deviation: float | None
    tolerance: float
    error: str = ""

    @property
    def holds(self) -> bool:
        return self.deviation is not None and self.deviation <= self.tolerance


def _tolerance(run: Run, name: str) -> float:
    """What rounding explains, in the units of the output.

    An output is the end of some 2 ** 10 dependent roundings (norms, projections, scores and a softmax, in two or three
    layers), and scores of up to 2 ** 6 turn an error of theirs into a relative one of the weights: 2 ** 16 half ulps
    of the largest output. Where one step works in float32, some 2 ** 4 roundings are of that size: 2 ** 10 of its half
    ulps. An angle is rounded relative to the position, so positions passed in add their size to the
    2 ** 10.
    """
    roundings = {"shift": max(map(abs, _SHIFTS)), "rowpos": max(_ROW_SHIFTS)}.get(name, 0) + 2**10
    ulps = roundings * 2**6 * torch.finfo(torch.float64).eps / 2
    if run.setting.float32:
        ulps += 2**10 * torch.finfo(torch.float32).eps / 2
    return ulps * max(1.0, float(run.full.abs().max()))


def _measure(run: Run, name: str) -> Measured:
    worst, tolerance = 0.0, _tolerance(run, name)
    try:
        for actual, expected in MEASURES[name](run):
            if actual.shape != expected.shape:
                return Measured(None, tolerance, f"{tuple(actual.shape)} outputs for {tuple(expected.shape)}")
            difference = (actual - expected).abs()
            worst = max(worst, float(difference.max()) if bool(difference.isfinite().all()) else math.inf)
    except Exception as error:  # whatever it is, the property is not had
        return Measured(None, tolerance, _message(error))
    return Measured(worst, tolerance)


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# the survey


@dataclass(frozen=True)
class Row:
    """What was found about one value of an option. `effect` is whether it changes the output of the model with xPos."""

    option: str
    value: str
    verdict: str
    plain: Mapping[str, Measured] = field(default_factory=dict)
    xpos: Mapping[str, Measured] = field(default_factory=dict)
    note: str = ""
    effect: bool | None = None

    @property
    def passed(self) -> bool:
        return self.verdict != BROKEN

    @property
    def broken(self) -> tuple[str, ...]:
        """The properties that plain rotary has and xPos lacks."""
        return tuple(name for name, measured in self.xpos.items() if not measured.holds)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More would spend their time waiting for each other, with models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def examine(setting: Setting, option: str = "", *, effect: bool = False) -> Row:
    """Compare plain rotary and xPos with `setting`; `effect` asks for `Row.effect`."""
    if setting.refused:
        return _refusal(setting, option)
    try:
        plain = Run(setting, PLAIN)
    except Exception as error:
        return Row(option, setting.label, PLAIN_FAILS, note=_message(error))
    has_context = any(call in setting.all_calls for call in _CONTEXTS)
    names = [name for name in PROPERTIES if name != "context" or has_context]
    of_plain = {name: _measure(plain, name) for name in names}
    try:
        xpos = Run(setting, XPOS)
    except Exception as error:
        return Row(option, setting.label, BROKEN, of_plain, note=_message(error))
    of_xpos = {name: _measure(xpos, name) for name in names if of_plain[name].holds}

    notes = [
        f"{name}: {measured.error or f'{measured.deviation:.1e} apart'}"
        for name, measured in of_xpos.items()
        if not measured.holds
    ]
    if not bool(plain.full.isfinite().all()):
        notes.append("plain rotary is not finite")
    return Row(
        option,
        setting.label,
        BROKEN if any(not measured.holds for measured in of_xpos.values()) else HOLDS,
        of_plain,
        of_xpos,
        "; ".join(notes) or setting.inert or setting.float32,
        _has_effect(setting, xpos) if effect else None,
    )


def _has_effect(setting: Setting, run: Run) -> bool:
    try:
        without = Run(setting.without(), XPOS)
    except Exception:  # it cannot be done without
        return True
    if without.full.shape != run.full.shape:
        return True
    return not bool(((without.full - run.full).abs() <= _tolerance(run, "")).all())


def _refusal(setting: Setting, option: str) -> Row:
    """Whether xPos is refused with `setting`, when built or else when called, and plain rotary is not."""
    for when, attempt in (("when built", _build), ("when called", Run)):
        try:
            attempt(setting, PLAIN)
        except Exception as error:
            return Row(option, setting.label, PLAIN_FAILS, note=_message(error))
        try:
            attempt(setting, XPOS)
        except Exception as error:
            said = isinstance(error, AssertionError) and setting.refused in str(error)
            note = f"{when}: {error}" if said else f"not refused but failed {when}: {_message(error)}"
            return Row(option, setting.label, REFUSED if said else BROKEN, note=note)
    return Row(option, setting.label, BROKEN, note="not refused with xPos")


def rows_of(entry: Entry) -> Iterator[Row]:
    """The rows of one option."""
    if not entry.settings:
        yield Row(entry.option, "", NOT_RUN, note=entry.reason)
    for setting in entry.settings:
        row = examine(setting, entry.option, effect=True)
        if row.verdict == PLAIN_FAILS and (not setting.fails or setting.fails not in row.note):
            # else a mistake in an entry would hide what it is about
            row = replace(row, verdict=BROKEN, note=f"plain rotary fails: {row.note}")
        yield row


def survey(progress: Callable[[str], None] = lambda _option: None) -> list[Row]:
    """The rows of all options, in the order of the signatures; `progress` is told the name of each."""
    rows: list[Row] = []
    # what upstream warns of is not about the models of whoever asks
    logger.disable(AttentionLayers.__module__)
    try:
        for entry in ENTRIES.values():
            progress(entry.option)
            rows += rows_of(entry)
    finally:
        logger.enable(AttentionLayers.__module__)
    return rows


# output

WIDTH = 110

_SYMBOLS = MappingProxyType(
    {"=": "plain rotary has it and so has xPos", "-": "plain rotary lacks it", "x": "xPos LACKS what plain rotary has"}
)


def symbol(row: Row, name: str) -> str:
    """One of `=`, `-` and `x`, or empty if the property is not about this option."""
    if name not in row.plain:
        return ""
    if not row.plain[name].holds:
        return "-"
    return "=" if name in row.xpos and row.xpos[name].holds else "x"


def format_table(rows: Sequence[Row]) -> str:
    """Plain text, 110 columns or fewer: a line per value of an option, a column per property."""
    heads = "".join(f" {name}" for name in PROPERTIES)
    width = WIDTH - len(heads)
    lines = [f"{'option':<{width}}{heads}"]
    for row in rows:
        name = f"{row.option}={row.value}" if row.value else row.option
        line = f"{textwrap.shorten(name, width - 1, placeholder='...'):<{width}}"
        if row.plain:
            line += "".join(f" {symbol(row, prop):^{len(prop)}}" for prop in PROPERTIES)
        else:
            line += textwrap.shorten(f" {row.verdict}: {row.note}", WIDTH - width - 1, placeholder="...")
        lines.append(line.rstrip())
    lines += ["", *(f"{mark}  {meaning}" for mark, meaning in _SYMBOLS.items()), ""]
    lines += [f"{name:<8} {meaning}" for name, meaning in PROPERTIES.items()]
    broken = [row for row in rows if not row.passed]
    if broken:
        lines.append("")
    for row in broken:
        lines += textwrap.wrap(f"BROKEN {row.option}={row.value}: {row.note}", WIDTH, subsequent_indent="       ")
    return "\n".join([*lines, "", conclusion(rows)])


def conclusion(rows: Sequence[Row]) -> str:
    """One line: how many values of how many options, and what is wrong."""
    total = f"{len(rows)} values of {len({row.option for row in rows})} options"
    broken = sum(not row.passed for row in rows)
    missing = unclassified()
    outcome = f"xPos keeps what plain rotary has: {total}" if not broken else f"{broken} of {total} BROKEN"
    return outcome + (f"; UNCLASSIFIED: {', '.join(missing)}" if missing else "")


def document(rows: Sequence[Row]) -> str:
    """One JSON object; a deviation is null where there is no finite one, and `error` says what was raised."""
    fields = {
        "format": 1,
        "passed": all(row.passed for row in rows) and not unclassified(),
        "unclassified": unclassified(),
        "properties": dict(PROPERTIES),
        "rows": [
            {
                "option": row.option,
                "value": row.value,
                "verdict": row.verdict,
                "note": row.note,
                "effect": row.effect,
                "plain": {name: _fields(measured) for name, measured in row.plain.items()},
                "xpos": {name: _fields(measured) for name, measured in row.xpos.items()},
            }
            for row in rows
        ],
    }
    return json.dumps(fields, indent=2, allow_nan=False)


def _fields(measured: Measured) -> dict[str, Any]:
    deviation = measured.deviation
    return {
        "deviation": deviation if deviation is not None and math.isfinite(deviation) else None,
        "tolerance": measured.tolerance,
        "holds": measured.holds,
        "error": measured.error or None,
    }
