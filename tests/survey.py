"""Every option of a decoder, and whether xPos keeps what plain rotary has with it.

    python tests/survey.py --write      # docs/options.md

An option is turned on in two models with the same random weights, one with `rotary_pos_emb=True` and one with
`rotary_xpos=True`, in float64. Where plain rotary has one of `PROPERTIES`, xPos must have it. There is no list of
exceptions: what is refused with xPos must be, with a message that names it, and plain rotary must run.

Options are read from the signatures of `AttentionLayers`, `Attention` (`attn_*`, and `cross_attn_*` for that of
cross-attention alone), `FeedForward` (`ff_*`) and `AttentionLayers.forward` (`forward.*`), so that one that upstream
adds is `unclassified` until `ENTRIES` says how to turn it on. Some of the wrapper's are added by hand (`wrapper.*`).
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from x_transformers import Attention, Decoder, FeedForward, TransformerWrapper
from x_transformers.x_transformers import AttentionLayers

BATCH, LENGTH, DIM, HEADS, DIM_HEAD, NUM_TOKENS, CONTEXT, CONDITION = 2, 13, 16, 2, 8, 12, 5, 12
PADDING = 4
# far enough that a center common to both rows leaves the range of float64: (1.4 / 0.4) ** (20,000 / 2 / 8) > 1.8e308
SHIFTS, ROW_SHIFTS = (-7, 4_000), (3, 20_000)

PLAIN = {"rotary_pos_emb": True}
# a decay of 0.29 ** (13 / 8) over the sequence: a wrong center shows in the first digit
XPOS = {"rotary_xpos": True, "rotary_xpos_scale_base": 8}

Options = Mapping[str, Any]


# what is passed in a call


@dataclass(frozen=True)
class Scene:
    """A call to be made: which rows and positions of the one sequence that all calls are about.

    Positions count from the left padding, if there is any. Those before `new` are in the cache (`how` is "decode",
    where the whole sequence is passed, or "chunk") or in the mems ("mems").
    """

    rows: tuple[int, ...] = (0, 1)
    stop: int = LENGTH
    new: int = 0
    how: str = ""
    shift: Tensor | None = None
    pad: int = 0
    context_pad: int = 0

    @property
    def first_query(self) -> int:
        """Where what belongs to the queries starts."""
        return self.new if self.how else 0

    @property
    def first_input(self) -> int:
        """Where the tokens that are passed start."""
        return 0 if self.how == "decode" else self.first_query

    @property
    def is_cached(self) -> bool:
        return self.how in ("decode", "chunk") and self.new > 0

    def normal(self, name: str, *shape: int) -> Tensor:
        """`(rows, *shape)`, the same for the same name and shape."""
        return noise(name, BATCH, *shape)[list(self.rows)]

    def sequence(self, data: Tensor, fill: float = 0) -> Tensor:
        """`data` `(batch, length, ...)` of these rows up to `stop`, behind the left padding."""
        data = data[list(self.rows)]
        padding = data.new_full((data.shape[0], self.pad, *data.shape[2:]), fill)
        return torch.cat((padding, data), dim=1)[:, : self.stop]

    def along(self, name: str, *shape: int) -> Tensor:
        """`(rows, n, *shape)` up to `stop`."""
        return self.sequence(noise(name, BATCH, LENGTH, *shape))

    def mask(self, *excluded: tuple[int, int]) -> Tensor:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        for row, position in excluded:
            mask[row, position] = False
        return self.sequence(mask)


def noise(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def context(s: Scene, _model: Any, dim: int = DIM, length: int = CONTEXT) -> Options:
    context = s.normal("context", CONTEXT, dim)[:, :length]
    if not s.context_pad:
        return {"context": context}
    padded = torch.cat((context, s.normal("context padding", s.context_pad, dim)), dim=1)
    mask = torch.arange(length + s.context_pad).expand(len(s.rows), -1) < length
    return {"context": padded, "context_mask": mask}


def context_mask(s: Scene, _model: Any) -> Options:
    mask = (torch.arange(CONTEXT + s.context_pad) < CONTEXT).repeat(BATCH, 1)
    mask[1, 1] = False
    return {"context_mask": mask[list(s.rows)]}


def context_pos(s: Scene, length: int = CONTEXT) -> Tensor:
    # moved with the queries: to the right by padding on the left, and a segment after mems starts at 0
    pos = torch.arange(length + s.context_pad) + s.pad - (s.new if s.how == "mems" else 0)
    return pos if s.shift is None else pos + s.shift


def mask(s: Scene, _model: Any) -> Options:
    mask = s.mask((1, 0), (1, 1), (1, 2))
    return {"mask": mask[:, s.new :], "mem_masks": [mask[:, : s.new]] * 9} if s.how == "mems" else {"mask": mask}


def attn_mask(s: Scene, _model: Any) -> Options:
    mask = torch.ones(LENGTH + s.pad, LENGTH + s.pad, dtype=torch.bool)
    mask[s.pad :, s.pad :] = (noise("attention mask", LENGTH, LENGTH) < 1).fill_diagonal_(True)
    return {"attn_mask": mask[s.first_query : s.stop, : s.stop]}


def attn_bias(s: Scene, _model: Any) -> Options:
    distance = torch.arange(LENGTH + s.pad)[:, None] - torch.arange(LENGTH + s.pad)
    bias = noise("attention bias", HEADS, 2 * LENGTH)[:, distance.clamp(min=0)]
    return {"attn_bias": bias[None, :, s.first_query : s.stop, : s.stop]}


def added_kv(s: Scene, _model: Any, heads: int = HEADS) -> Options:
    layers = [tuple(s.normal(f"added {kind} {layer}", heads, 3, DIM_HEAD) for kind in "kv") for layer in range(2)]
    return {"self_attn_additional_kv": layers}


def added_kv_of_a_model(s: Scene, _model: Any) -> Options:
    tokens = (s.normal("other tokens", 4).abs() * 4).long()
    return {"self_attn_additional_kv": build(Setting(), {})(tokens, return_intermediates=True)[1]}


def cross_kv_residuals(s: Scene, _model: Any) -> Options:
    data = s.normal("cross-attention residuals", 2 * CONTEXT, DIM)[:, : CONTEXT + s.context_pad]
    return {"cross_attn_kv_residuals": data[:, : 0 if s.is_cached else None]}  # the keys of the context are cached


def rotary_table(s: Scene, model: Any) -> Options:
    rotary, pos = model.attn_layers.rotary_pos_emb, torch.arange(s.stop)
    if s.shift is None:
        return {"rotary_pos_emb": rotary.forward_from_seq_len(s.stop)}
    pos = pos + s.shift
    if "seq_len" not in inspect.signature(rotary.forward).parameters:  # the unpatched release
        return {"rotary_pos_emb": rotary(pos)}
    return {"rotary_pos_emb": rotary(pos, offset=pos.amin(dim=-1, keepdim=True), seq_len=s.stop)}


def window(s: Scene, _model: Any) -> Options:
    if s.shift is not None and s.shift.numel() > 1:  # rows that far apart have no window in common
        return {}
    return {"rotary_window": (0 if s.shift is None else int(s.shift), LENGTH + s.pad)}


CALLS: Mapping[str, Callable[[Scene, Any], Options]] = {
    "context": context,
    "wide context": partial(context, dim=DIM + 4),
    "no context": partial(context, length=0),
    "context_mask": context_mask,
    "context_pos": lambda s, _: {"context_pos": context_pos(s)},
    "context_pos per row": lambda s, _: {
        "context_pos": context_pos(s) + torch.tensor([[1], [2]])[list(s.rows)],
    },
    "no context_pos": lambda s, _: {"context_pos": context_pos(s, length=0)},
    "condition": lambda s, _: {"condition": s.normal("condition", CONDITION)},
    "wide condition": lambda s, _: {"condition": s.normal("condition", DIM)},
    "condition per position": lambda s, _: {"condition": s.along("condition", CONDITION)[:, s.first_query :]},
    "mask": mask,
    "kv_mask": lambda s, _: {"self_attn_kv_mask": s.mask((1, 2))},
    "attn_mask": attn_mask,
    "attn_bias": attn_bias,
    "seq_start_pos": lambda s, _: {"seq_start_pos": torch.tensor([0, 2])[list(s.rows)] + s.pad},
    "added_kv": added_kv,
    "added_kv of one head": partial(added_kv, heads=1),
    "added_kv of a model": added_kv_of_a_model,
    "added_kv_mask": lambda s, _: {"additional_kv_mask": torch.tensor([[True] * 3, [True, False, True]])[list(s.rows)]},
    "in_attn_cond": lambda s, _: {"in_attn_cond": s.normal("in-attention condition", DIM)},
    "self_kv_residuals": lambda s, _: {
        "self_attn_kv_residuals": s.along("self-attention residuals", DIM)[:, s.first_query :],
    },
    "cross_kv_residuals": cross_kv_residuals,
    "rotary_table": rotary_table,
    "window": window,
    "transform": lambda *_: {"transform_block_inputs": lambda block, x: x * (1 + block / 8)},
    # not before the chunks and segments that follow the first
    "prepend": lambda s, _: {} if s.first_input else {"prepend_embeds": s.normal("prepended", 3, DIM)},
}


# what is turned on


@dataclass(frozen=True)
class Setting:
    """One value of an option: keyword arguments of the decoder, of the wrapper (`wrapper.*`), and `CALLS`.

    `needs` and `needs_calls` are what it requires. `inert` says why it changes no output. `refused` is what the message
    must say that refuses it with xPos, `fails` the one that refuses it with any rotary: there is nothing to compare.
    """

    label: str = ""
    options: Options = field(default_factory=dict)
    calls: tuple[str, ...] = ()
    needs: Options = field(default_factory=dict)
    needs_calls: tuple[str, ...] = ()
    inert: str = ""
    refused: str = ""
    fails: str = ""
    # a step works in float32 whatever the model's dtype
    in_float32: bool = False

    @property
    def all_options(self) -> dict[str, Any]:
        return {**self.needs, **self.options}

    @property
    def all_calls(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.needs_calls, *self.calls)))

    def contains(self, part: Setting) -> bool:
        kinds = [{call.removeprefix("wide ").removesuffix(" per row") for call in s.all_calls} for s in (part, self)]
        found = self.all_options
        return kinds[0] <= kinds[1] and all(found.get(name) == value for name, value in part.all_options.items())


@dataclass(frozen=True)
class Entry:
    """How to turn on one option, or the reason why that is not the question."""

    option: str
    settings: tuple[Setting, ...] = ()
    reason: str = ""

    @property
    def added(self) -> bool:
        """It is not in the release that the fork is made of."""
        return self.option == "forward.rotary_window"


ENTRIES: dict[str, Entry] = {}

CROSS: Options = {"cross_attend": True}
CROSS_CALLS = ("context", "context_pos")
GIVEN = "given by AttentionLayers from what it is given itself, and an error if passed as well"
TRAINING = "for training only"
GPU = "needs the library flash-attn and a GPU"
# a function of attention is not used where a custom one is given
OWN = "attn_custom_attn_fn=None"
ADAPTIVE = f"use_adaptive_layernorm dim_condition={CONDITION}"

# what AttentionLayers gives to self-attention alone: a value for that of cross-attention, what it needs, and what plain
# rotary says if it fails
ONLY_GIVEN_TO_SELF: Mapping[str, tuple[Any, Options, str]] = {
    "causal": (True, {}, ""),
    "qkv_receive_diff_residuals": (True, {}, "can only be used for self attention"),
    "learned_value_residual_mix": (True, {"add_value_residual": True}, "must match the size"),
    "rotate_num_heads": (1, {}, ""),
}
# what plain rotary cannot have in cross-attention either, and what it says
ONLY_SELF = {
    "selective": "designed for autoregressive",
    "orthog_projected_values": "must match the size",  # as many values as queries
    "orthog_projected_values_per_head": "must match the size",
    "data_dependent_alibi": "must match the size",
    "data_dependent_alibi_kwargs": "must match the size",
    "data_dependent_alibi_per_row": "bidirectional not supported",
    "data_dependent_alibi_per_row_dim_head": "bidirectional not supported",
    "use_cope": "designed for causal attention",
    "cope_max_pos": "designed for causal attention",
    "cope_soft_onehot_pos": "designed for causal attention",
    "cope_talking_heads": "designed for causal attention",
}


def enter(option: str, *settings: Setting, reason: str = "") -> None:
    ENTRIES[option] = Entry(option, settings, reason)
    kind, _, name = option.partition("attn_")
    if kind or name not in parameters(Attention):
        return
    cross = f"cross_{option}"
    if name in ONLY_GIVEN_TO_SELF:
        value, needs, fails = ONLY_GIVEN_TO_SELF[name]
        label = str(value)
        settings = (Setting(label, {cross: value}, needs={**CROSS, **needs}, needs_calls=CROSS_CALLS, fails=fails),)
    elif name == "l2_distance":
        # without positions of the context its queries and keys are not rotated
        alone = Setting("True", {cross: True}, needs=CROSS, needs_calls=("context",))
        settings = (
            alone,
            replace(
                alone,
                label="True, context_pos",
                needs_calls=CROSS_CALLS,
                refused="`context_pos` - use `rotary_pos_emb = True`",
            ),
        )
    else:
        settings = tuple(of_cross_attention(name, setting) for setting in settings)
    ENTRIES[cross] = Entry(cross, settings, "" if settings else reason)


def of_cross_attention(name: str, setting: Setting) -> Setting:
    """The same setting of cross-attention alone, whose context has positions."""
    options, needs = (
        {f"cross_{key}" if key.startswith("attn_") else key: value for key, value in each.items()}
        for each in (setting.options, setting.needs)
    )
    calls = () if any("context" in call for call in setting.all_calls) else CROSS_CALLS
    needs_calls = (*setting.needs_calls, *calls)
    setting = replace(setting, options=options, needs={**needs, **CROSS}, needs_calls=needs_calls)
    return replace(setting, refused="", fails=ONLY_SELF[name]) if name in ONLY_SELF else setting


def parse(text: str) -> list[tuple[str, Any]]:
    """`a b=2` is `[("a", True), ("b", 2)]`."""
    pairs = (word.partition("=") for word in text.split())
    return [(name, ast.literal_eval(value) if value else True) for name, _, value in pairs]


def on(text: str, *calls: str, needs: str | Options = "", context: bool = False, **how: Any) -> None:
    """Options of the decoder, each turned on alone; with several values one after the other."""
    needs = dict(parse(needs)) if isinstance(needs, str) else needs
    if context:
        needs, calls = {**needs, **CROSS}, (*calls, *CROSS_CALLS)
    for name, value in parse(text):
        before = ENTRIES[name].settings if name in ENTRIES else ()
        enter(name, *before, Setting(str(value), {name: value}, needs=needs, needs_calls=calls, **how))


def not_run(reason: str, names: str) -> None:
    for name in names.split():
        enter(name, reason=reason)


def parameters(owner: type, method: str = "__init__") -> list[str]:
    found = inspect.signature(getattr(owner, method)).parameters.values()
    return [p.name for p in found if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


class Recurrent(nn.Module):
    """Something to mix with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(DIM, HEADS * DIM_HEAD, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.gru(x, hidden)


def enter_options_of_the_decoder() -> None:
    on("only_attn use_scalenorm use_rmsnorm use_dynamic_tanh use_derf use_simple_rmsnorm norm_add_unit_offset=False")
    on("pre_norm=False pre_norm_has_final_norm=False pre_and_post_norm sandwich_norm alibi_pos_bias use_layerscale")
    on("weight_tie_layers macaron custom_layers=('a','a','f','f') layers_execute_order=(0,1,2,3,0,1) sandwich_coef=1")
    on("par_ratio=2 dim=24 depth=1 depth=3 rotary_emb_dim=4 rotary_emb_dim=8 rotary_interpolation_factor=2.5")
    on("rotary_xpos_scale_base=4 rotary_xpos_scale_base=32 rotary_xpos_scale_base=512 rotary_base_rescale_factor=4.0")
    on("rotate_num_heads=1 residual_attn gate_residual orthog_residual mv_split_residual scale_residual")
    on("scale_residual_constant=0.5 depth_scale_residual=0.7 num_residual_streams=2 integrate_layers reinject_input")
    on("add_value_residual shift_tokens=1 softclamp_output disable_abs_pos_emb=False attn_dim_head=12")
    on("attn_value_dim_head=12 attn_project_out=False attn_one_kv_head attn_pre_talking_heads attn_post_talking_heads")
    on("attn_pre_scale_post_talking_heads attn_softclamp_logits attn_selective attn_cog_signed attn_max_attend_past=2")
    on("attn_laser attn_num_mem_kv=3 attn_add_zero_kv attn_head_learned_sink attn_qk_norm attn_qk_norm=(True,False)")
    on("attn_qk_rmsnorm attn_k_rmsnorm attn_value_rmsnorm attn_head_scale attn_on_attn attn_gate_value_heads")
    on("attn_gate_values attn_output_gate attn_orthog_projected_values attn_orthog_projected_values_per_head")
    on("attn_data_dependent_alibi attn_use_rel_proj_pos_bias ff_mult=2 ff_glu ff_swish ff_relu_squared ff_solu")
    on("ff_post_act_ln ff_no_bias ff_softclamp_value=2.0")
    enter("heads", Setting("1", {"heads": 1, "attn_dim_head": DIM}), Setting("4", {"heads": 4}))
    enter("ff_custom_activation", Setting("Tanh", {"ff_custom_activation": nn.Tanh()}))

    # with what they need
    on("dynamic_tanh_init_alpha=0.5", needs="use_dynamic_tanh")
    on("alibi_num_heads=1 rel_pos_kwargs={'slopes':[0.5,0.3]}", needs="alibi_pos_bias")
    on("unet_skips", needs="depth=3")
    on("attn_aggregated_residuals", needs="attn_aggregated_residual_kwargs={'lora_rank':4}")
    on("attn_aggregated_residual_kwargs={'lora_rank':4}", needs="attn_aggregated_residuals")
    on("residual_fn_kwargs={'learned':True}", needs="mv_split_residual")
    on("layer_integrate_use_softmax=False", needs="integrate_layers")
    on("learned_reinject_input_gate", needs="reinject_input")
    on("learned_value_residual_mix=False", needs="add_value_residual")
    on("softclamp_output_value=2.0", needs="softclamp_output")
    gated_streams = "num_residual_streams=2 residual_fn_kwargs={'read_gate_rank':4}"
    on("gated_multi_residual", needs=gated_streams)
    for needs in ("num_residual_streams=2", f"gated_multi_residual {gated_streams}"):
        on("qkv_receive_diff_residuals", needs=needs)
    on("attn_kv_heads=1 attn_kv_heads=2", needs="heads=4")
    on("attn_hard attn_sigmoid attn_sparse_topk=2 attn_gumbel_softmax", needs=OWN)
    on("attn_gumbel_softmax_hard=False", needs=f"attn_gumbel_softmax {OWN}")
    on("attn_gumbel_softmax_temp=0.5", needs=f"attn_gumbel_softmax attn_gumbel_softmax_hard=False {OWN}")
    on("attn_logit_softclamp_value=2.0", needs="attn_softclamp_logits")
    on("attn_laser_softclamp_value=2.0", needs="attn_laser")
    on("attn_qk_norm_groups=2 attn_qk_norm_scale=4 attn_qk_norm_dim_scale", needs="attn_qk_norm")
    on("attn_use_latent_q", needs="attn_dim_latent_q=12")
    on("attn_dim_latent_q=12", needs="attn_use_latent_q")
    on("attn_use_latent_kv", needs="attn_dim_latent_kv=12")
    on("attn_dim_latent_kv=12", needs="attn_use_latent_kv")
    on("attn_latent_rope_subheads=1", needs="attn_use_latent_kv attn_dim_latent_kv=12")
    on("attn_swiglu_values attn_gate_values_rank=4 attn_gate_values_headwise", needs="attn_gate_values")
    on("attn_output_gate_rank=4 attn_output_gate_headwise", needs="attn_output_gate")
    on("attn_low_rank_silu_gates=False", needs="attn_gate_values attn_gate_values_rank=4")
    on("attn_data_dependent_alibi_per_row", needs="attn_data_dependent_alibi")
    on("attn_data_dependent_alibi_kwargs={'post_log_scale':0.5}", needs="attn_data_dependent_alibi")
    per_row = "attn_data_dependent_alibi attn_data_dependent_alibi_per_row"
    on("attn_data_dependent_alibi_per_row_dim_head=4", needs=per_row)
    on("attn_rel_proj_num_distance_basis=4 attn_rel_proj_max_dist=8", needs="attn_use_rel_proj_pos_bias")
    on("ff_glu_mult_bias ff_glu_softclamp", needs="ff_glu")
    on("ff_glu_gate_softclamp_value=1.0 ff_glu_up_softclamp_value=1.0", needs="ff_glu ff_glu_softclamp")
    hybrid = {"attn_hybrid_module": Recurrent(), "attn_hybrid_fold_axial_dim": 1}
    enter("attn_hybrid_module", Setting("a GRU", hybrid))
    enter("attn_hybrid_fold_axial_dim", Setting("2", {**hybrid, "attn_hybrid_fold_axial_dim": 2}))
    on("attn_hybrid_learned_mix", needs=hybrid)

    # with what is passed in a call
    cross = Setting("True", CROSS, ("context",))
    enter("cross_attend", cross, replace(cross, label="True, context_pos", calls=CROSS_CALLS))
    on("only_cross cross_residual_attn", context=True)
    for option in ("use_adaptive_layernorm", "use_adaptive_rmsnorm", "use_adaptive_layerscale"):
        enter(option, Setting("True", {option: True, "dim_condition": CONDITION}, ("condition",)))
    enter("dim_condition", Setting("16", dict(parse("use_adaptive_layernorm dim_condition=16")), ("wide condition",)))
    on("adaptive_condition_mlp", "condition", needs=ADAPTIVE)
    on("adaptive_condition_mlp_expansion=2", "condition", needs=f"adaptive_condition_mlp {ADAPTIVE}")
    wide = Setting("20", {"cross_attn_dim_context": DIM + 4}, ("wide context", "context_pos"), needs=CROSS)
    enter("attn_dim_context", wide)
    over_queries = partial(torch.softmax, dim=-2)
    inverted = {"cross_attn_inverted_attention": True, "cross_attn_custom_attn_fn": over_queries}
    enter("attn_inverted_attention", Setting("True", inverted, needs=CROSS, needs_calls=CROSS_CALLS))

    # what changes nothing
    random = "an initial value, and all parameters are random here"
    on("zero_init_branch_output attn_zero_init_output ff_zero_init_output", inert=random)
    on("layerscale_init_value=0.5", needs="use_layerscale", inert=random)
    on("layer_dropout=0.5 attn_dropout=0.5 attn_sublayer_dropout=0.5 ff_dropout=0.5", inert=TRAINING)
    on("ff_sublayer_dropout=0.5", inert=TRAINING)
    on("cross_attn_tokens_dropout=0.5", context=True, inert=TRAINING)
    on("attn_sparse_topk_straight_through", needs=f"attn_sparse_topk=2 {OWN}", inert=TRAINING)
    on("attn_dim_out=16 ff_dim_out=16", inert="no other than the model's own fits the residual stream")
    on("verbose", inert="what is logged when the model is built")
    on("hyper_conn_sinkhorn_iters=2", needs="num_residual_streams=2", inert="it normalises one weight at a time: to 1")
    flash = Setting("True", dict(parse(f"attn_flash {OWN}")), inert="the same attention, by another kernel")
    enter("attn_flash", flash)
    on("attn_attend_sdp_kwargs={'enable_math':True}", needs=f"attn_flash {OWN}", inert="the choice of a kernel")
    on("attn_onnxable", inert="the same mask, made in another way")
    on("attn_custom_attn_fn=None", inert="the softmax, in float32", in_float32=True)
    on("attn_hybrid_mask_kwarg='mask'", needs=hybrid, inert="only used if not causal")

    # what is refused
    on("causal=False", refused="bidirectional")
    remedy = "- use `rotary_pos_emb = True` instead"
    on("attn_l2_distance", refused=f"`attn_l2_distance` {remedy}")
    on("attn_use_cope", refused=f"`attn_use_cope` {remedy}")
    cope = "attn_cope_max_pos=4 attn_cope_soft_onehot_pos attn_cope_talking_heads"
    on(cope, needs="attn_use_cope", refused=f"`attn_use_cope` {remedy}")

    # a default of positions, made for rotary, is taken for custom ones
    only_alibi = "only alibi allowed for custom positions"
    on("rel_pos_bias dynamic_pos_bias", fails=only_alibi)
    on("rel_pos_num_buckets=8 rel_pos_max_distance=64", needs="rel_pos_bias", fails=only_alibi)
    dynamic = "dynamic_pos_bias_log_distance dynamic_pos_bias_mlp_depth=3 dynamic_pos_bias_norm"
    on(dynamic, needs="dynamic_pos_bias", fails=only_alibi)
    on("polar_pos_emb", fails="either rotary positional embedding or polar")
    on("polar_bias_uniform_init", needs="polar_pos_emb", fails="either rotary positional embedding or polar")

    not_run("what is compared: plain rotary and xPos", "rotary_pos_emb rotary_xpos")
    not_run(GIVEN, "attn_dim attn_heads attn_causal attn_qkv_receive_diff_residuals attn_learned_value_residual_mix")
    not_run(GIVEN, "attn_rotate_num_heads attn_output_proj_depth ff_dim ff_output_proj_depth")
    not_run(GPU, "attn_flash_pack_seq")


def forward(name: str, label: str, call: str, needs: str | Options = "", *needs_calls: str, **how: Any) -> None:
    """An argument of `AttentionLayers.forward`; with several values one after the other."""
    needs = dict(parse(needs)) if isinstance(needs, str) else needs
    setting = Setting(label, needs, tuple(call.split(" + ")), needs_calls=needs_calls, **how)
    before = ENTRIES[f"forward.{name}"].settings if f"forward.{name}" in ENTRIES else ()
    enter(f"forward.{name}", *before, setting)


def enter_arguments_of_forward() -> None:
    cross_with_memory = "cross_attend attn_num_mem_kv=3"
    forward("context", "(b, m, d)", "context", CROSS)
    forward("context", "(b, 0, d), num_mem_kv", "no context + no context_pos", cross_with_memory)
    forward("context_mask", "(b, m)", "context_mask", CROSS, *CROSS_CALLS)
    forward("context_pos", "(m,)", "context_pos", CROSS, "context")
    forward("context_pos", "(b, m)", "context_pos per row", CROSS, "context")
    forward("context_pos", "(m,), num_mem_kv", "context_pos", cross_with_memory, "context")
    forward("cross_attn_kv_residuals", "(b, m, d)", "cross_kv_residuals", CROSS, *CROSS_CALLS)
    forward("mask", "(b, n)", "mask")
    forward("mem_masks", "(b, n)", "mask")
    forward("self_attn_kv_mask", "(b, n)", "kv_mask")
    forward("self_attn_kv_mask", "(b, n), flash", "kv_mask", f"attn_flash {OWN}")
    forward("attn_mask", "(n, n)", "attn_mask")
    forward("attn_bias", "(1, h, i, j)", "attn_bias")
    forward("seq_start_pos", "(b,)", "seq_start_pos")
    forward("in_attn_cond", "(b, d)", "in_attn_cond")
    forward("self_attn_kv_residuals", "(b, n, d)", "self_kv_residuals")
    forward("condition", "(b, d)", "condition", ADAPTIVE)
    forward("condition", "(b, n, d)", "condition per position", ADAPTIVE)
    forward("layers_execute_order", "(0, 1, 0, ...)", "layers_execute_order=(0,1,0,1,2,3)")
    forward("repeat_blocks", "(1, 2)", "repeat_blocks=(1,2)")
    forward("transform_block_inputs", "callable", "transform")
    forward("return_gumbel_log_probs", "True", "return_gumbel_log_probs", inert="what else is returned")
    forward("deep_embeds_and_ids", "ff_deep_embed", "", "wrapper.ff_deep_embed")
    forward("self_attn_additional_kv", "tuples", "added_kv")
    forward("self_attn_additional_kv", "tuples of one head", "added_kv of one head")
    forward("self_attn_additional_kv", "of a model", "added_kv of a model")
    forward("self_attn_additional_kv", "tuples, num_mem_kv", "added_kv", "attn_num_mem_kv=2")
    forward("additional_kv_mask", "(b, m)", "added_kv_mask", "", "added_kv")
    forward("detach_additional_kv", "True", "detach_additional_kv", "", "added_kv", inert=TRAINING)
    forward("route_additional_kv_to_top", "False", "route_additional_kv_to_top=False", "depth=3", "added_kv")
    forward("rotary_window", "all", "window", inert="it only moves the center")
    forward("rotary_pos_emb", "table", "rotary_table", inert="the same as without")
    need_pos = "`context_pos` and `rotary_window` need `pos` instead of `rotary_pos_emb`"
    forward("rotary_pos_emb", "table, context_pos", "rotary_table", CROSS, *CROSS_CALLS, refused=need_pos)
    forward("rotary_window", "all, table", "window", "", "rotary_table", refused=need_pos)
    forward("causal", "True", "causal=True", inert="a decoder is causal")
    forward("causal", "False", "causal=False", refused="`causal = False` - use `rotary_pos_emb = True`")
    not_run("the properties pass it", "forward.mems forward.cache forward.input_not_include_cache forward.cache_age")
    not_run("the properties vary it", "forward.seq_pos_offset forward.pos")
    not_run("the wrapper passes it", "forward.return_hiddens")
    not_run("of polar_pos_emb", "forward.polar_pos_emb")
    not_run(GPU, "forward.flash_pack_seq_kwargs forward.flash_pack_seq_context_kwargs")

    memory_tokens = {"wrapper.num_memory_tokens": 2}
    interspersed = {**memory_tokens, "wrapper.memory_tokens_interspersed_every": 4}
    enter("wrapper.num_memory_tokens", Setting("2", memory_tokens), Setting("2, interspersed", interspersed))
    enter("wrapper.recycling", Setting("True", {"wrapper.recycling": True}, ("recycle_steps=2",)))
    looped = {"wrapper.looped": True, "pre_and_post_norm": True}
    enter("wrapper.looped", Setting("True", looped, ("looped_steps=2",)))
    enter("wrapper.forward.prepend_embeds", Setting("(b, 3, d)", calls=("prepend",)))


with torch.random.fork_rng(devices=[]):
    enter_options_of_the_decoder()
    enter_arguments_of_forward()


def options() -> list[str]:
    """The names of all options, from the signatures."""
    return [
        *parameters(AttentionLayers),
        *(f"{prefix}attn_{name}" for name in parameters(Attention) for prefix in ("", "cross_")),
        *(f"ff_{name}" for name in parameters(FeedForward)),
        *(f"forward.{name}" for name in parameters(AttentionLayers, "forward") if name != "x"),
    ]


def combine(*settings: Setting) -> Setting | None:
    """All of them at once, or None if two want different things of one argument. Refused if it contains what is."""
    merged: dict[str, Any] = {}
    for name, value in (item for setting in settings for item in setting.all_options.items()):
        if name in merged and merged[name] is not value and merged[name] != value:
            return None
        merged[name] = value
    calls = tuple(dict.fromkeys(call for setting in settings for call in setting.all_calls))
    whole = Setting(
        " + ".join(s.label for s in settings), merged, calls, in_float32=any(s.in_float32 for s in settings)
    )
    parts = (part for entry in ENTRIES.values() for part in entry.settings if part.refused)
    return replace(whole, refused=next((part.refused for part in parts if whole.contains(part)), ""))


# models


def build(setting: Setting, rotary: Options) -> nn.Module:
    given = {
        "dim": DIM,
        "depth": 2,
        "heads": HEADS,
        "attn_dim_head": DIM_HEAD,
        # some of each head is not rotated
        "rotary_emb_dim": 6,
        # the default one works in float32, which would put a floor under what float64 can tell
        "attn_custom_attn_fn": partial(torch.softmax, dim=-1),
        "verbose": False,
        **rotary,
        **setting.all_options,
    }
    wrapper = {name.removeprefix("wrapper."): given.pop(name) for name in list(given) if name.startswith("wrapper.")}
    layers = AttentionLayers if "causal" in given else Decoder
    model = TransformerWrapper(
        num_tokens=NUM_TOKENS, max_seq_len=64, max_mem_len=64, attn_layers=layers(**given), **wrapper
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

    def __init__(self, setting: Setting, rotary: Options) -> None:
        self.setting = setting
        self.model: Any = build(setting, rotary)
        self.tokens = (noise("tokens", BATCH, LENGTH).abs() * 5).long().clamp(max=NUM_TOKENS - 1)
        self.full = self(Scene())[0]

    @torch.no_grad()
    def __call__(self, scene: Scene, cache: Any = None, mems: Any = None) -> tuple[Tensor, Any]:
        """Outputs of the positions from `new` on, and the intermediates."""
        return self.forward(scene, cache, mems)

    def forward(self, scene: Scene, cache: Any = None, mems: Any = None) -> tuple[Tensor, Any]:
        """The same, with gradients if the model's parameters have them."""
        arguments: dict[str, Any] = {"return_intermediates": True, "return_mems": True, "mems": mems}
        if cache is not None:
            passed_alone = scene.how == "chunk"
            arguments.update(cache=cache, cache_age=scene.stop - scene.new, input_not_include_cache=passed_alone)
        if scene.pad:
            arguments["seq_start_pos"] = torch.full((len(scene.rows),), scene.pad)
        for call in self.setting.all_calls:
            arguments.update(CALLS[call](scene, self.model) if call in CALLS else parse(call))
        tokens = scene.sequence(self.tokens, fill=1)[:, scene.first_input :]
        if scene.shift is not None:
            arguments["pos"] = torch.arange(self.positions(tokens.shape[1], arguments)) + scene.shift
        if scene.how != "mems":
            arguments.pop("mem_masks", None)

        torch.manual_seed(0)  # for attention that draws at random
        out, intermediates = self.model(tokens, **arguments)
        out = out[:, scene.new - scene.stop :]
        if "seq_start_pos" in arguments:
            # what comes out of padding means nothing
            padding = torch.arange(scene.new, scene.stop) < arguments["seq_start_pos"][:, None]
            out = out.masked_fill(padding[..., None], 0)
        return out, intermediates

    def positions(self, length: int, arguments: Options) -> int:
        """How many positions the wrapper makes of `length` tokens."""
        blocks, every = 1, self.model.memory_tokens_interspersed_every
        if every is not None:
            blocks = math.ceil(length / every)
            length = blocks * every
        prepended = arguments.get("prepend_embeds")
        return length + blocks * self.model.num_memory_tokens + (0 if prepended is None else prepended.shape[1])


# the properties: each yields two outputs that must be the same

Pairs = Iterator[tuple[Tensor, Tensor]]


def in_parts(run: Run, how: str, sizes: Sequence[int]) -> Pairs:
    start, state = 0, {}
    for size in sizes:
        stop = start + size
        out, after = run(Scene(stop=stop, new=start, how=how), **state)
        state = {"mems": after.mems} if how == "mems" else {"cache": after}
        yield out, run.full[:, start:stop]
        start = stop


def prefix(run: Run) -> Pairs:
    for stop in (2, 8):
        yield run(Scene(stop=stop))[0], run.full[:, :stop]


def rows(run: Run) -> Pairs:
    for row in range(BATCH):
        yield run(Scene(rows=(row,)))[0], run.full[row : row + 1]


def shift(run: Run) -> Pairs:
    for shift in SHIFTS:
        yield run(Scene(shift=torch.tensor(shift)))[0], run.full


def shift_of_rows(run: Run) -> Pairs:
    yield run(Scene(shift=torch.tensor(ROW_SHIFTS)[:, None]))[0], run.full


def padding(run: Run) -> Pairs:
    yield run(Scene(stop=LENGTH + PADDING, new=PADDING, pad=PADDING))[0], run.full


def padding_of_context(run: Run) -> Pairs:
    yield run(Scene(context_pad=4))[0], run.full


PROPERTIES = {
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
MEASURES: Mapping[str, Callable[[Run], Pairs]] = {
    "prefix": prefix,
    "decode": partial(in_parts, how="decode", sizes=(10, 1, 1, 1)),
    "chunks": partial(in_parts, how="chunk", sizes=(4, 1, 8)),
    "mems": partial(in_parts, how="mems", sizes=(6, 7)),
    "rows": rows,
    "shift": shift,
    "rowpos": shift_of_rows,
    "pad": padding,
    "context": padding_of_context,
}


def tolerance(run: Run, name: str) -> float:
    """What rounding explains, in the units of the output.

    An output is the end of some 2 ** 10 dependent roundings (norms, projections, scores and a softmax, in two or three
    layers), and scores of up to 2 ** 6 turn an error of theirs into a relative one of the weights: 2 ** 16 half ulps
    of the largest output. Where one step works in float32, some 2 ** 4 roundings are of that size: 2 ** 10 of its half
    ulps. An angle is rounded relative to the position: positions passed in add their size to the 2 ** 10.
    """
    roundings = {"shift": max(map(abs, SHIFTS)), "rowpos": max(ROW_SHIFTS)}.get(name, 0) + 2**10
    ulps = roundings * 2**6 * torch.finfo(torch.float64).eps / 2
    if run.setting.in_float32:
        ulps += 2**10 * torch.finfo(torch.float32).eps / 2
    return ulps * max(1.0, float(run.full.abs().max()))


def failure(run: Run, name: str) -> str:
    """How a property is not had, or nothing."""
    allowed = tolerance(run, name)
    try:
        for actual, expected in MEASURES[name](run):
            if actual.shape != expected.shape:
                return f"{tuple(actual.shape)} outputs for {tuple(expected.shape)}"
            apart = float((actual - expected).abs().max())
            if not apart <= allowed:  # NaN is
                return f"{apart:.1e} apart"
    except Exception as error:  # whatever it is, the property is not had
        return message(error)
    return ""


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


# the survey

HOLDS, BROKEN, REFUSED, PLAIN_FAILS, NOT_RUN = "holds", "broken", "refused", "plain fails", "not run"


@dataclass(frozen=True)
class Row:
    """What was found about one value of an option: the properties that plain rotary lacks, and xPos besides.

    `effect` is whether it changes the output of the model with xPos.
    """

    option: str
    value: str
    verdict: str
    note: str = ""
    lacks: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    effect: bool | None = None

    @property
    def name(self) -> str:
        return f"{self.option}={self.value}" if self.value not in ("", "True") else self.option


def examine(setting: Setting, option: str = "", *, effect: bool = False) -> Row:
    """Compare plain rotary and xPos with `setting`; `effect` asks for `Row.effect`."""
    row = partial(Row, option, setting.label)
    if setting.refused:
        return row(*refusal(setting))
    try:
        plain = Run(setting, PLAIN)
    except Exception as error:
        return row(PLAIN_FAILS, message(error))
    try:
        xpos = Run(setting, XPOS)
    except Exception as error:
        return row(BROKEN, message(error))
    has_context = any(call.endswith("context") for call in setting.all_calls)
    names = [name for name in PROPERTIES if name != "context" or has_context]
    lacks = tuple(name for name in names if failure(plain, name))
    broken = {name: failed for name in names if name not in lacks and (failed := failure(xpos, name))}
    note = "; ".join(f"{name}: {failed}" for name, failed in broken.items()) or setting.inert
    has_effect = changes_something(setting, xpos) if effect else None
    return row(BROKEN if broken else HOLDS, note, lacks, tuple(broken), has_effect)


def changes_something(setting: Setting, run: Run) -> bool:
    try:
        without = Run(Setting(needs=setting.needs, needs_calls=setting.needs_calls), XPOS)
    except Exception:  # it cannot be done without
        return True
    if without.full.shape != run.full.shape:
        return True
    return not bool(((without.full - run.full).abs() <= tolerance(run, "")).all())


def refusal(setting: Setting) -> tuple[str, str]:
    """Whether xPos is refused with `setting`, when built or else when called, and plain rotary is not."""
    for when, attempt in (("when built", build), ("when called", Run)):
        try:
            attempt(setting, PLAIN)
        except Exception as error:
            return PLAIN_FAILS, message(error)
        try:
            attempt(setting, XPOS)
        except Exception as error:
            said = isinstance(error, AssertionError) and setting.refused in str(error)
            return (REFUSED, f"{when}: {error}") if said else (BROKEN, f"not refused but failed: {message(error)}")
    return BROKEN, "not refused with xPos"


@cache
def rows_of(option: str) -> tuple[Row, ...]:
    """The rows of one option."""
    entry = ENTRIES[option]
    if not entry.settings:
        return (Row(option, "", NOT_RUN, entry.reason),)
    logger.disable(AttentionLayers.__module__)  # what upstream warns of
    return tuple(examine(setting, option, effect=True) for setting in entry.settings)


# docs/options.md

DOCUMENT = Path(__file__).parent.parent / "docs" / "options.md"


def document() -> str:
    """The survey as a page: options with the same outcome stand together."""
    known = dict.fromkeys((*options(), *ENTRIES))
    found = [row for option in known for row in rows_of(option)]
    groups: dict[tuple[str, Any], list[str]] = {}
    for row in found:
        why = {HOLDS: row.lacks, REFUSED: row.note, NOT_RUN: row.note}.get(row.verdict)
        groups.setdefault((row.verdict, why), []).append(f"`{row.name}`")

    def listed(start: str, names: Sequence[str]) -> list[str]:
        return [*textwrap.wrap(f"{start}{', '.join(names)}", 118, subsequent_indent="  ", break_long_words=False), ""]

    lines = [
        "# Options of a decoder with xPos",
        "",
        "Written by `python tests/survey.py --write`, and kept true by tests/test_survey.py.",
        "",
        f"{len(found)} values of {len(known)} options were turned on in two models with the same weights, one with",
        "plain rotary and one with xPos. Where plain rotary has one of these properties, xPos has it too:",
        "",
        *(f"- {name}: {meaning}" for name, meaning in PROPERTIES.items()),
        "",
    ]
    for title, verdict in (
        ("The same with plain rotary and xPos", HOLDS),
        ("Refused with xPos", REFUSED),
        ("No plain rotary to compare with", PLAIN_FAILS),
        ("Broken", BROKEN),
        ("Not turned on", NOT_RUN),
    ):
        of_verdict = [(why, names) for (kind, why), names in groups.items() if kind == verdict]
        lines += [f"## {title}", ""] if of_verdict else []
        for why, names in sorted(of_verdict, key=lambda group: len(group[0] or ())) if verdict == HOLDS else of_verdict:
            if verdict == HOLDS:
                start = f"neither has {', '.join(why)}, both have the rest: " if why else "both have all: "
            else:
                start = f"{why}: " if why else ""
            lines += listed(f"- {start}", names)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")
