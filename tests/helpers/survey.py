"""Every option of a decoder, and whether xPos keeps what plain rotary has with it.

    python tests/helpers/survey.py      # writes docs/options.md, and survey.json, from which the page is made

An option is turned on in two models with the same random weights, one with `rotary_pos_emb=True` and one with
`rotary_xpos=True`, in float64. Where plain rotary has one of `PROPERTIES`, xPos must have it. There is no list of
exceptions: what is refused with xPos must be, with a message that names it, and plain rotary must run.

Options are read from the signatures of `AttentionLayers`, `Attention` (`attn_*`, and `cross_attn_*` for that of
cross-attention alone), `FeedForward` (`ff_*`) and `AttentionLayers.forward` (`forward.*`), so that one that upstream
adds is unclassified until it is said how to turn it on. Some of the wrapper's are added by hand (`wrapper.*`).
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from strategies import IS_OLDER, exact, gradients, softmax
from torch import Tensor, nn
from ways import Exact, message

from x_transformers import Attention, Decoder, TransformerWrapper
from x_transformers.x_transformers import AttentionLayers, FeedForward
from x_transformers.xpos.checker import properties, runs
from x_transformers.xpos.checker.models import Model, Text
from x_transformers.xpos.checker.properties import Point, Property
from x_transformers.xpos.checker.runs import Plan, deviation

BATCH, LENGTH, DIM, HEADS, NUM_TOKENS, CONTEXT, CONDITION = 2, 13, 16, 2, 12, 5, 12
# some of each head is not rotated
DIM_HEAD, ROTATED = (48, 32) if IS_OLDER else (8, 6)
# far enough that a center common to both rows leaves the range of float64: (1.4 / 0.4) ** (20,000 / 2 / 8) > 1.8e308
SHIFTS = (-7, 4_000, 20_000)

PLAIN = {"rotary_pos_emb": True}
# a decay of 0.29 ** (13 / 8) over the sequence: a wrong center shows in the first digit
XPOS = {"rotary_xpos": True, "rotary_xpos_scale_base": 8}

Options = Mapping[str, Any]


# what is passed in a call


@dataclass(frozen=True)
class Scene:
    """A call: which rows and positions of the one sequence that all calls are about.

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

    def mask(self, *excluded: int) -> Tensor:
        """`(rows, n)`, without these positions of the second row."""
        mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        mask[1, list(excluded)] = False
        return self.sequence(mask)


@cache
def noise(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def context(s: Scene, _model: Any, dim: int = DIM, length: int = CONTEXT) -> Options:
    context = s.normal("context", CONTEXT, dim)[:, :length]
    if not s.context_pad:
        return {"context": context}
    padded = torch.cat((context, s.normal("context padding", s.context_pad, dim)), dim=1)
    return {"context": padded, "context_mask": torch.arange(padded.shape[1]).expand(len(s.rows), -1) < length}


def context_mask(s: Scene, _model: Any) -> Options:
    mask = (torch.arange(CONTEXT + s.context_pad) < CONTEXT).repeat(BATCH, 1)
    mask[1, 1] = False
    return {"context_mask": mask[list(s.rows)]}


def context_pos(s: Scene, _model: Any, length: int = CONTEXT, starts: Sequence[Sequence[int]] = ((), ())) -> Options:
    # moved with the queries: to the right by padding on the left, and a segment after mems starts at 0
    pos = torch.arange(length + s.context_pad) + s.pad - (s.new if s.how == "mems" else 0)
    pos = pos if s.shift is None else pos + s.shift
    return {"context_pos": pos + torch.tensor(starts)[list(s.rows)] if any(starts) else pos}


def mask(s: Scene, _model: Any) -> Options:
    mask = s.mask(0, 1, 2)
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
    return {"self_attn_additional_kv": build({}, {})(tokens, return_intermediates=True)[1]}


def cross_kv_residuals(s: Scene, _model: Any) -> Options:
    data = s.normal("cross-attention residuals", 2 * CONTEXT, DIM)[:, : CONTEXT + s.context_pad]
    is_cached = s.how in ("decode", "chunk") and s.new > 0  # the keys of the context, then
    return {"cross_attn_kv_residuals": data[:, : 0 if is_cached else None]}


def rotary_table(s: Scene, model: Any) -> Options:
    rotary, pos = model.attn_layers.rotary_pos_emb, torch.arange(s.stop) - (s.new if s.how == "mems" else 0)
    pos = pos if s.shift is None else pos + s.shift
    if "seq_len" not in inspect.signature(rotary.forward).parameters:  # the unpatched release
        return {"rotary_pos_emb": rotary(pos)}
    window = dict(offset=pos[..., s.first_query, None], seq_len=s.stop - s.first_query)
    return {"rotary_pos_emb": rotary(pos, **window)}


def window(s: Scene, _model: Any) -> Options:
    if s.shift is not None and s.shift.numel() > 1:  # rows that far apart have no window in common
        return {}
    return {"rotary_window": (0 if s.shift is None else int(s.shift), LENGTH + s.pad)}


CALLS: Mapping[str, Callable[[Scene, Any], Options]] = {
    "context": context,
    "wide_context": partial(context, dim=DIM + 4),
    "no_context": partial(context, length=0),
    "context_mask": context_mask,
    "context_pos": context_pos,
    "context_pos_per_row": partial(context_pos, starts=((1,), (2,))),
    "no_context_pos": partial(context_pos, length=0),
    "condition": lambda s, _: {"condition": s.normal("condition", CONDITION)},
    "condition_along": lambda s, _: {"condition": s.along("condition", CONDITION)[:, s.first_query :]},
    "mask": mask,
    "kv_mask": lambda s, _: {"self_attn_kv_mask": s.mask(2)},
    "attn_mask": attn_mask,
    "attn_bias": attn_bias,
    "seq_start_pos": lambda s, _: {"seq_start_pos": torch.tensor([0, 2])[list(s.rows)] + s.pad},
    "added_kv": added_kv,
    "added_kv_of_one_head": partial(added_kv, heads=1),
    "added_kv_of_a_model": added_kv_of_a_model,
    "added_kv_mask": lambda s, _: {"additional_kv_mask": torch.tensor([[True] * 3, [True, False, True]])[list(s.rows)]},
    "in_attn_cond": lambda s, _: {"in_attn_cond": s.normal("in-attention condition", DIM)},
    "self_kv_residuals": lambda s, _: {"self_attn_kv_residuals": s.along("residuals", DIM)[:, s.first_query :]},
    "cross_kv_residuals": cross_kv_residuals,
    "rotary_table": rotary_table,
    "window": window,
    "transform": lambda *_: {"transform_block_inputs": lambda block, x: x * (1 + block / 8)},
    # not before the chunks and segments that follow the first
    "prepend": lambda s, _: {} if s.first_input else {"prepend_embeds": s.normal("prepended", 3, DIM)},
    "sum_embeds": lambda s, _: {"sum_embeds": s.along("summed", DIM)[:, s.first_input :]},
    "kinds": lambda s, _: {"embed_ids": {"kind": (s.along("kinds")[:, s.first_input :] > 0).long()}},
}


# what is turned on


@dataclass(frozen=True)
class Setting:
    """One value of an option, and what it requires: keyword arguments of the decoder, of the wrapper (`wrapper.*`), and
    of the call (`@*`, where `CALLS` has it or as it is).

    `inert` says why it changes no output. `refused` is what the message must say that refuses it with xPos, `fails`
    the one that refuses it with any rotary: there is nothing to compare.
    """

    name: str
    on: Options
    needs: Options = field(default_factory=dict)
    inert: str = ""
    refused: str = ""
    fails: str = ""
    # a step works in float32 whatever the model's dtype
    in_float32: bool = False

    @property
    def words(self) -> Options:
        return {**self.needs, **self.on}

    @property
    def option(self) -> str:
        return self.name.partition("=")[0]


class Recurrent(nn.Module):
    """Something to mix with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(DIM, HEADS * DIM_HEAD, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.gru(x, hidden)


with torch.random.fork_rng(devices=[]):
    VALUES = {"Tanh": nn.Tanh(), "GRU": Recurrent(), "over_queries": partial(torch.softmax, dim=-2)}

SETTINGS: list[Setting] = []
# of options that are not turned on
REASONS: dict[str, str] = {}
# the only option that is not in the release that the fork is made of
ADDED = "forward.rotary_window"

CROSS = "cross_attend @context @context_pos"
GIVEN = "given by AttentionLayers from what it is given itself, and an error if passed as well"
TRAINING = "for training only"
GPU = "needs the library flash-attn and a GPU"
# a function of attention is not used where a custom one is given
OWN = "attn_custom_attn_fn=None"
ADAPTIVE = f"use_adaptive_layernorm dim_condition={CONDITION} @condition"

# what plain rotary cannot have in cross-attention either, by what it says
ONLY_SELF = {
    "designed for autoregressive": "selective",
    "must match the size": "orthog_projected_values orthog_projected_values_per_head "
    "data_dependent_alibi data_dependent_alibi_kwargs",
    "bidirectional not supported": "data_dependent_alibi_per_row data_dependent_alibi_per_row_dim_head",
    "designed for causal attention": "use_cope cope_max_pos cope_soft_onehot_pos cope_talking_heads",
}


def parameters(owner: type, method: str = "__init__") -> list[str]:
    found = inspect.signature(getattr(owner, method)).parameters.values()
    return [p.name for p in found if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


# the others are turned on in a way of their own, or given
CROSS_TOO = {*parameters(Attention)} - {"l2_distance", "dim_context"}


def parse(text: str) -> dict[str, Any]:
    """`a b=2` is `{"a": True, "b": 2}`."""
    pairs = (word.partition("=") for word in text.split())
    return {name: VALUES.get(value) or ast.literal_eval(value or "True") for name, _, value in pairs}


def words_of(name: str) -> str:
    """Of `forward.a=b` what is passed in the call: what `CALLS` has for b, or else b itself."""
    _, of_forward, argument = name.rpartition("forward.")
    if not of_forward:
        return name
    value = argument.partition("=")[2]
    return f"@{value}" if value in CALLS else f"@{argument}"


def on(names: str, needs: str = "", words: str = "", **how: Any) -> None:
    """Options, each turned on alone, by `words` if not as `words_of` says; and those of cross-attention with them."""
    for name in names.split():
        setting = Setting(name, parse(words or words_of(name)), parse(needs), **how)
        SETTINGS.append(setting)
        if setting.option.startswith("attn_") and setting.option.removeprefix("attn_") in CROSS_TOO:
            SETTINGS.append(of_cross_attention(setting))


def of_cross_attention(setting: Setting) -> Setting:
    """The same setting of cross-attention alone, whose context has positions."""
    turned_on, needs = (
        {f"cross_{key}" if key.startswith("attn_") else key: value for key, value in words.items()}
        for words in (setting.on, {**setting.needs, **parse(CROSS)})
    )
    option = setting.option.removeprefix("attn_")
    fails = next((message for message, names in ONLY_SELF.items() if option in names.split()), "")
    return replace(setting, name=f"cross_{setting.name}", on=turned_on, needs=needs, refused="", fails=fails)


def not_run(reason: str, names: str) -> None:
    REASONS.update(dict.fromkeys(names.split(), reason))


def enter_options_of_the_decoder() -> None:
    on("only_attn use_scalenorm use_rmsnorm use_dynamic_tanh use_derf use_simple_rmsnorm norm_add_unit_offset=False")
    on("pre_norm=False pre_norm_has_final_norm=False pre_and_post_norm sandwich_norm alibi_pos_bias use_layerscale")
    on("weight_tie_layers macaron custom_layers=('a','a','f','f') layers_execute_order=(0,1,2,3,0,1) sandwich_coef=1")
    on("par_ratio=2 dim=24 depth=1 depth=3 heads=4 rotary_emb_dim=4 rotary_emb_dim=8 rotary_interpolation_factor=2.5")
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
    on("ff_post_act_ln ff_no_bias ff_softclamp_value=2.0 ff_custom_activation=Tanh")

    # with what they need
    on("heads=1", f"attn_dim_head={DIM}")
    on("dynamic_tanh_init_alpha=0.5", "use_dynamic_tanh")
    on("alibi_num_heads=1 rel_pos_kwargs={'slopes':[0.5,0.3]}", "alibi_pos_bias")
    on("unet_skips", "depth=3")
    on("attn_aggregated_residuals", "attn_aggregated_residual_kwargs={'lora_rank':4}")
    on("attn_aggregated_residual_kwargs={'lora_rank':4}", "attn_aggregated_residuals")
    on("residual_fn_kwargs={'learned':True}", "mv_split_residual")
    on("layer_integrate_use_softmax=False", "integrate_layers")
    on("learned_reinject_input_gate", "reinject_input")
    on("learned_value_residual_mix=False", "add_value_residual")
    on("softclamp_output_value=2.0", "softclamp_output")
    gated_streams = "num_residual_streams=2 residual_fn_kwargs={'read_gate_rank':4}"
    on("gated_multi_residual", gated_streams)
    differ = "qkv_receive_diff_residuals"
    on(differ, "num_residual_streams=2")
    on(f"{differ}=gated", f"gated_multi_residual {gated_streams}", differ)
    on(f"{differ}=LIMe", "integrate_layers", differ, inert="LIMe turns it on")
    on("attn_kv_heads=1 attn_kv_heads=2", "heads=4")
    on("attn_hard attn_sigmoid attn_sparse_topk=2 attn_gumbel_softmax", OWN)
    on("attn_gumbel_softmax_hard=False", f"attn_gumbel_softmax {OWN}")
    on("attn_gumbel_softmax_temp=0.5", f"attn_gumbel_softmax attn_gumbel_softmax_hard=False {OWN}")
    on("attn_logit_softclamp_value=2.0", "attn_softclamp_logits")
    on("attn_laser_softclamp_value=2.0", "attn_laser")
    on("attn_qk_norm_groups=2 attn_qk_norm_scale=4 attn_qk_norm_dim_scale", "attn_qk_norm")
    on("attn_use_latent_q", "attn_dim_latent_q=12")
    on("attn_dim_latent_q=12", "attn_use_latent_q")
    on("attn_use_latent_kv", "attn_dim_latent_kv=12")
    on("attn_dim_latent_kv=12", "attn_use_latent_kv")
    on("attn_latent_rope_subheads=1", "attn_use_latent_kv attn_dim_latent_kv=12")
    on("attn_swiglu_values attn_gate_values_rank=4 attn_gate_values_headwise", "attn_gate_values")
    on("attn_output_gate_rank=4 attn_output_gate_headwise", "attn_output_gate")
    on("attn_low_rank_silu_gates=False", "attn_gate_values attn_gate_values_rank=4")
    forgetting = "attn_data_dependent_alibi"
    on("attn_data_dependent_alibi_per_row attn_data_dependent_alibi_kwargs={'post_log_scale':0.5}", forgetting)
    on("attn_data_dependent_alibi_per_row_dim_head=4", f"{forgetting} {forgetting}_per_row")
    on("attn_rel_proj_num_distance_basis=4 attn_rel_proj_max_dist=8", "attn_use_rel_proj_pos_bias")
    on("ff_glu_mult_bias ff_glu_softclamp", "ff_glu")
    on("ff_glu_gate_softclamp_value=1.0 ff_glu_up_softclamp_value=1.0", "ff_glu ff_glu_softclamp")
    on("attn_hybrid_module=GRU", "attn_hybrid_fold_axial_dim=1")
    on("attn_hybrid_fold_axial_dim=2", "attn_hybrid_module=GRU")
    on("attn_hybrid_learned_mix", "attn_hybrid_module=GRU attn_hybrid_fold_axial_dim=1")

    # with what is passed in a call
    on("cross_attend", "", "cross_attend @context")
    on("cross_attend=context_pos", "", CROSS)
    on("only_cross cross_residual_attn", CROSS)
    on("use_adaptive_layernorm use_adaptive_rmsnorm use_adaptive_layerscale", f"dim_condition={CONDITION} @condition")
    on(f"dim_condition={CONDITION}", "use_adaptive_layernorm @condition")
    on("adaptive_condition_mlp", ADAPTIVE)
    on("adaptive_condition_mlp_expansion=2", f"adaptive_condition_mlp {ADAPTIVE}")
    for option in ("attn_dim_context", "cross_attn_dim_context"):
        on(f"{option}=20", "cross_attend @wide_context @context_pos", "cross_attn_dim_context=20")
    on("attn_inverted_attention", "", "attn_inverted_attention attn_custom_attn_fn=over_queries")
    # what is given to self-attention alone
    on("cross_attn_causal cross_attn_rotate_num_heads=1", CROSS)
    on("cross_attn_qkv_receive_diff_residuals", CROSS, fails="can only be used for self attention")
    on("cross_attn_learned_value_residual_mix", f"{CROSS} add_value_residual", fails="must match the size")

    # what changes nothing
    random = "an initial value, and all parameters are random here"
    on("zero_init_branch_output attn_zero_init_output ff_zero_init_output", inert=random)
    on("layerscale_init_value=0.5", "use_layerscale", inert=random)
    on("layer_dropout=0.5 attn_dropout=0.5 attn_sublayer_dropout=0.5 ff_dropout=0.5", inert=TRAINING)
    on("ff_sublayer_dropout=0.5", inert=TRAINING)
    on("cross_attn_tokens_dropout=0.5", CROSS, inert=TRAINING)
    on("attn_sparse_topk_straight_through", f"attn_sparse_topk=2 {OWN}", inert=TRAINING)
    on("attn_dim_out=16 ff_dim_out=16", inert="no other than the model's own fits the residual stream")
    on("verbose", inert="what is logged when the model is built")
    on("hyper_conn_sinkhorn_iters=2", "num_residual_streams=2", inert="it normalises one weight at a time: to 1")
    on("attn_flash", "", f"attn_flash {OWN}", inert="the same attention, by another kernel")
    on("attn_attend_sdp_kwargs={'enable_math':True}", f"attn_flash {OWN}", inert="the choice of a kernel")
    on("attn_onnxable", inert="the same mask, made in another way")
    on("attn_custom_attn_fn=None", inert="the softmax, in float32", in_float32=True)
    hybrid = "attn_hybrid_module=GRU attn_hybrid_fold_axial_dim=1"
    on("attn_hybrid_mask_kwarg='mask'", hybrid, inert="only used if not causal")

    # what is refused
    on("causal=False", refused="bidirectional")
    remedy = "- use `rotary_pos_emb = True` instead"
    neither = f"`attn_l2_distance` or `attn_use_cope` {remedy}"
    on("attn_l2_distance attn_use_cope", refused=neither)
    cope = "attn_cope_max_pos=4 attn_cope_soft_onehot_pos attn_cope_talking_heads"
    on(cope, "attn_use_cope", refused=neither)
    # without positions of the context its queries and keys are not rotated
    on("cross_attn_l2_distance", "cross_attend @context")
    on("cross_attn_l2_distance=context_pos", CROSS, "cross_attn_l2_distance", refused=f"`context_pos` {remedy[:-8]}")

    # a default of positions, made for rotary, is taken for custom ones
    only_alibi = "only alibi allowed for custom positions"
    on("rel_pos_bias dynamic_pos_bias", fails=only_alibi)
    on("rel_pos_num_buckets=8 rel_pos_max_distance=64", "rel_pos_bias", fails=only_alibi)
    dynamic = "dynamic_pos_bias_log_distance dynamic_pos_bias_mlp_depth=3 dynamic_pos_bias_norm"
    on(dynamic, "dynamic_pos_bias", fails=only_alibi)
    on("polar_pos_emb", fails="either rotary positional embedding or polar")
    on("polar_bias_uniform_init", "polar_pos_emb", fails="either rotary positional embedding or polar")

    not_run("what is compared: plain rotary and xPos", "rotary_pos_emb rotary_xpos")
    not_run(GIVEN, "attn_dim attn_heads attn_causal attn_qkv_receive_diff_residuals attn_learned_value_residual_mix")
    not_run(GIVEN, "attn_rotate_num_heads attn_output_proj_depth ff_dim ff_output_proj_depth")
    not_run(GIVEN, "cross_attn_dim cross_attn_heads cross_attn_output_proj_depth")
    not_run(GPU, "attn_flash_pack_seq cross_attn_flash_pack_seq")


def enter_arguments_of_forward() -> None:
    on("forward.mask=mask forward.mem_masks=mask forward.self_attn_kv_mask=kv_mask forward.attn_mask=attn_mask")
    on("forward.attn_bias=attn_bias forward.seq_start_pos=seq_start_pos forward.in_attn_cond=in_attn_cond")
    on("forward.self_attn_kv_residuals=self_kv_residuals forward.transform_block_inputs=transform")
    on("forward.layers_execute_order=(0,1,0,1,2,3) forward.repeat_blocks=(1,2)")
    on("forward.self_attn_additional_kv=added_kv forward.self_attn_additional_kv=added_kv_of_one_head")
    on("forward.self_attn_additional_kv=added_kv_of_a_model")
    on("forward.self_attn_additional_kv=added_kv,num_mem_kv", "attn_num_mem_kv=2", "@added_kv")
    on("forward.additional_kv_mask=added_kv_mask", "@added_kv")
    on("forward.route_additional_kv_to_top=False", "depth=3 @added_kv")
    on("forward.self_attn_kv_mask=kv_mask,flash", f"attn_flash {OWN}", "@kv_mask")
    on("forward.deep_embeds_and_ids=ff_deep_embed", "", "wrapper.ff_deep_embed")
    adaptive = ADAPTIVE.replace("@condition", "")
    on("forward.condition=condition forward.condition=condition_along", adaptive)
    on("forward.context=context", "cross_attend")
    on("forward.context_mask=context_mask forward.cross_attn_kv_residuals=cross_kv_residuals", CROSS)
    on("forward.context_pos=context_pos forward.context_pos=context_pos_per_row", "cross_attend @context")
    with_memory = "cross_attend attn_num_mem_kv=3"
    on("forward.context=no_context,num_mem_kv", with_memory, "@no_context @no_context_pos")
    on("forward.context_pos=context_pos,num_mem_kv", f"{with_memory} @context", "@context_pos")

    on("forward.detach_additional_kv", "@added_kv", inert=TRAINING)
    on("forward.return_gumbel_log_probs", inert="what else is returned")
    on("forward.rotary_window=window", inert="it only moves the center")
    on("forward.rotary_pos_emb=rotary_table", inert="the same as without")
    table = "forward.rotary_pos_emb=rotary_table"
    on(f"{table},num_mem_kv", "attn_num_mem_kv=3", "@rotary_table", inert="the same as without")
    on(f"{table},context_pos", CROSS, "@rotary_table", inert="the same as without")
    on("forward.rotary_window=window,table", "@rotary_table", "@window", inert="a table has a center of its own")
    on("forward.causal", inert="a decoder is causal")
    on("forward.causal=False", refused="`causal = False` - use `rotary_pos_emb = True`")
    not_run("the properties pass it", "forward.mems forward.cache forward.input_not_include_cache forward.cache_age")
    not_run("the properties vary it", "forward.seq_pos_offset forward.pos")
    not_run("the wrapper passes it", "forward.return_hiddens")
    not_run("of polar_pos_emb", "forward.polar_pos_emb")
    not_run(GPU, "forward.flash_pack_seq_kwargs forward.flash_pack_seq_context_kwargs")

    on("wrapper.num_memory_tokens=2 wrapper.forward.prepend_embeds=prepend wrapper.forward.sum_embeds=sum_embeds")
    on("wrapper.forward.return_attn")
    on("wrapper.memory_tokens_interspersed_every=4", "wrapper.num_memory_tokens=2")
    on("wrapper.recycling", "", "wrapper.recycling @recycle_steps=2")
    on("wrapper.looped", "pre_and_post_norm", "wrapper.looped @looped_steps=2")
    on("wrapper.embed_num_tokens={'kind':2}", "", "wrapper.embed_num_tokens={'kind':2} @kinds")
    on("wrapper.shift_mem_down=1", inert="it only moves mems")


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


def is_known(setting: Setting) -> bool:
    """Whether this release has the option; the older line lacks many."""
    return setting.option.startswith("wrapper.") or setting.option in options()


def combine(*settings: Setting) -> Setting | None:
    """All of them at once, or None if two want different things of one argument, or what is refused together."""
    merged: dict[str, Any] = {}
    for name, value in (item for setting in settings for item in setting.words.items()):
        if name in merged and merged[name] is not value and merged[name] != value:
            return None
        merged[name] = value
    has_context_pos = any("context_pos" in name for name in merged)
    if has_context_pos and ("cross_attn_l2_distance" in merged or {"@rotary_table", "@window"} <= merged.keys()):
        return None
    return Setting(" + ".join(s.name for s in settings), merged, in_float32=any(s.in_float32 for s in settings))


# models


def build(words: Options, rotary: Options) -> nn.Module:
    logger.disable(AttentionLayers.__module__)  # what upstream warns of
    given = {
        "dim": DIM,
        "depth": 2,
        "heads": HEADS,
        "attn_dim_head": DIM_HEAD,
        "rotary_emb_dim": ROTATED,
        # the default softmax works in float32, which would put a floor under what float64 can tell
        **({} if IS_OLDER else {"attn_custom_attn_fn": softmax, "verbose": False}),
        **rotary,
        **{name: value for name, value in words.items() if not name.startswith("@")},
    }
    wrapper = {name.removeprefix("wrapper."): given.pop(name) for name in list(given) if name.startswith("wrapper.")}
    layers = AttentionLayers if "causal" in given else Decoder
    model = TransformerWrapper(
        num_tokens=NUM_TOKENS, max_seq_len=64, max_mem_len=64, attn_layers=layers(**given), **wrapper
    )
    model = exact(model.double().eval().requires_grad_(False))
    for name, parameter in model.named_parameters():
        # each drawn by its name, so that models that differ in one parameter share the others; all of them, since one
        # that starts at zero or one would hide what multiplies it; large enough that attention is far from uniform
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
        parameter.copy_(noise(name, *parameter.shape) * (2 / fan_in) ** 0.5)
    return model


class Surveyed(Model):
    """A model with a setting, which makes what has to be passed in a call for what the call is about."""

    def __init__(self, setting: Setting, module: nn.Module) -> None:
        super().__init__(module)
        self.setting, self.context_pad = setting, 0

    @property
    def takes_prefill(self) -> bool:
        return not any(name.startswith("@") for name in self.setting.words)

    def positions(self, length: int) -> int:
        return super().positions(length) + 3 * ("@prepend" in self.setting.words)

    def __call__(self, text: Text, **options: Any) -> tuple[Tensor, Any]:
        scene, arguments = self.scene(text, **options), dict(return_intermediates=True, **options)
        for name, value in self.setting.words.items():
            if name.startswith("@"):
                call = CALLS.get(name[1:])
                arguments.update(call(scene, self.module) if call else {name[1:]: value})
        if scene.how != "mems":
            arguments.pop("mem_masks", None)

        torch.manual_seed(0)  # for attention that draws at random
        out, intermediates = self.module(text.main, **arguments)
        out = out[:, scene.new - scene.stop :]
        if "return_attn" in arguments:
            out = torch.cat([out, *attention_of(intermediates, scene)], dim=-1)
        if "seq_start_pos" in arguments:
            # what comes out of padding means nothing
            padding = torch.arange(scene.new, scene.stop) < arguments["seq_start_pos"][:, None]
            out = out.masked_fill(padding[..., None], 0)
        return out, intermediates

    def scene(
        self, text: Text, cache: Any = None, cache_age: int = 0, mems: Any = None, pos: Any = None, **options: Any
    ) -> Scene:
        how = "chunk" if options.get("input_not_include_cache") else "decode" if cache is not None else ""
        new = text.start if cache is None else text.stop - cache_age
        return Scene(
            rows=tuple(range(BATCH)[text.rows]),
            stop=text.stop,
            new=new,
            how="mems" if mems is not None else how,
            shift=None if pos is None else pos[..., :1] if pos.ndim > 1 else pos[0],
            pad=int(options.get("seq_start_pos", torch.zeros(1)).max()),
            context_pad=self.context_pad,
        )


PLAN = Plan(lengths=(8, LENGTH), chunks=(5,), segments=((6, 7),), steps=3, shifts=SHIFTS)


def case_of(setting: Setting, module: nn.Module) -> Exact:
    """What the properties are measured on, once it can be called."""
    tokens = (noise("tokens", BATCH, LENGTH).abs() * 5).long().clamp(max=NUM_TOKENS - 1)
    found = Exact(Surveyed(setting, module), Text(tokens), PLAN, in_float32=setting.in_float32)
    found.full  # noqa: B018
    return found


def attention_of(intermediates: Any, scene: Scene) -> Iterator[Tensor]:
    """`(b, n, h)` for each layer: the weights of each query, combined at random: the same if they are."""
    for layer in intermediates.attn_intermediates:
        weights = layer.post_softmax_attn[..., scene.new - scene.stop :, scene.pad :]
        yield (weights @ noise("attention", 64)[: weights.shape[-1]]).transpose(1, 2)


def padded_context(case: Exact) -> Iterator[Point]:
    case.model.context_pad = 4
    try:
        yield Point(LENGTH, deviation(case.model(case.text)[0], case.full))
    finally:
        case.model.context_pad = 0


# those of the check, by why the output changes where one is not had, and what to do then
CHANGES = {
    "prefix": ("what follows", "leave it out of language models"),
    "rows": ("chance", "nothing: it draws at random, as meant"),
    "cached-whole": ("the KV cache", "`generate(..., cache_kv = False)`"),
    "chunked": ("the KV cache", "no `prefill`"),
    "mems": ("`mems`", "one call for all segments"),
    "shift": ("shifted positions", "positions from 0 on"),
    "padded": ("left padding", "padding on the right"),
    "context": ("padding of the context", "a context without padding"),
}
CONTEXT_PADDED = Property("context", "the output, with and without padding of the context", padded_context, "calls")
PROPERTIES = [prop for prop in (*properties.ALL, CONTEXT_PADDED) if prop.key in CHANGES]


# the survey

HOLDS, REFUSED, PLAIN_FAILS = "What plain rotary has, xPos has", "Refused with xPos", "Refused with any rotary"
BROKEN = "Broken"


def examine(setting: Setting) -> tuple[str, str]:
    """Compare plain rotary and xPos with `setting`: the verdict, and what is to be said about it."""
    plain: Any = PLAIN
    xpos: Any = XPOS
    for when, attempt in (("when built", partial(build, setting.words)), ("when called", partial(case_of, setting))):
        try:
            plain = attempt(plain)
        except Exception as error:
            expected = setting.fails and setting.fails in str(error)
            return PLAIN_FAILS, setting.fails if expected else message(error)
        try:
            xpos = attempt(xpos)
        except Exception as error:
            said = setting.refused and isinstance(error, AssertionError) and setting.refused in str(error)
            return (REFUSED, f"{when}: {error}") if said else (BROKEN, message(error))
    if setting.refused:
        return BROKEN, "not refused with xPos"
    has_context = any(name.startswith("@") and name.endswith("context") for name in setting.words)
    xpos.plain = plain
    measured = [prop for prop in PROPERTIES if has_context or prop is not CONTEXT_PADDED]
    failed = {prop.key: how for prop in measured if (how := xpos.failure(prop))}
    # plain rotary is run for these alone, as it takes as long
    neither = [prop.key for prop in measured if prop.key in failed and plain.failure(prop)]
    if failed.keys() - neither:
        return BROKEN, "; ".join(f"{name}: {how}" for name, how in failed.items() if name not in neither)
    return HOLDS, f"all but {', '.join(neither)}, which neither has" if neither else "all"


def changes_something(setting: Setting) -> bool:
    """Whether it changes the output of the model with xPos."""
    found, plain = case_of(setting, build(setting.words, XPOS)), Setting("", {}, setting.needs)
    try:
        without = case_of(plain, build(plain.words, XPOS)).full
    except Exception:  # it cannot be done without
        return True
    return without.shape != found.full.shape or not deviation(without, found.full) <= found.tolerance("")


def answers(case: Exact) -> list[Tensor]:
    """What it gives in every way that it can be called, as far as it gets in each, and gradients."""
    model, text, found = case.model, case.text, [case.full, *case.model.module.state_dict().values()]
    by_row = {"pos": torch.arange(model.positions(LENGTH)) + torch.tensor([[3], [20_000]])}
    ways: Sequence[Callable[[], Tensor]] = (
        partial(runs.token_by_token, model, text, LENGTH - 3, only_new=False),
        partial(runs.in_chunks, model, text, PLAN.chunks[0]),
        partial(runs.in_segments, model, text, PLAN.segments[0]),
        lambda: model(text, **by_row)[0],
        lambda: model(text, seq_start_pos=torch.full((BATCH,), 4))[0],
    )
    for way in ways:
        try:
            found.append(way())
        except Exception as error:  # it cannot do this with the option
            found.append(torch.tensor(list(type(error).__name__.encode())))
    out, _ = Surveyed(model.setting, model.module.requires_grad_(True))(text)
    return [*found, *(gradients(model.module, out) if out.requires_grad else [])]


# what was found about each option, and docs/options.md, which is made from it

RECORD, DOCUMENT = Path(__file__).with_suffix(".json"), Path(__file__).parents[2] / "docs" / "options.md"


def write_record() -> None:
    by_finding: dict[str, list[str]] = {}
    for setting in SETTINGS:
        by_finding.setdefault(": ".join(examine(setting)), []).append(setting.name)
    RECORD.write_text(json.dumps(by_finding, indent=2) + "\n", encoding="utf-8")


def read_record() -> dict[str, str]:
    by_finding: dict[str, list[str]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return {name: finding for finding, names in by_finding.items() for name in names}


def as_written(settings: Sequence[Setting]) -> str:
    """Without values but False, without what needs another of them, and self- and cross-attention in one."""
    options = {setting.option for setting in settings}
    names = [setting.name for setting in settings if not options & {*setting.needs} - {setting.option}]
    labels = [re.sub(r"^(wrapper\.)?(forward\.)?|=(?!False).*", "", name) for name in names]
    both = {f"cross_{label}" for label in labels} & {*labels}
    shown = (f"[cross_]{label}" if f"cross_{label}" in both else label for label in labels if label not in both)
    return ", ".join(f"`{label}`" for label in dict.fromkeys(shown)).replace("=", " = ")


def page(found: Mapping[str, str]) -> str:
    refused, broken = dict[tuple[str, ...], list[Setting]](), dict[tuple[str, ...], list[Setting]]()
    for setting in SETTINGS:
        verdict, _, note = found[setting.name].partition(": ")
        # another option with memory key / values has what these have
        has_memory = any("attn_num_mem_kv" in name for name in setting.words)
        if verdict == REFUSED:
            refused.setdefault(tuple(note.split(": ", 1)), []).append(setting)
        elif verdict == PLAIN_FAILS:
            refused.setdefault(("with plain rotary too", "an error of upstream"), []).append(setting)
        elif note.startswith("all but") and (not has_memory or "attn_num_mem_kv" in setting.option):
            failed = note.removeprefix("all but ").partition(", which")[0].split(", ")
            # whatever else changes follows from these
            failed = next(([name] for name in ("rows", "prefix") if name in failed), failed)
            cells = (", ".join(dict.fromkeys(cells)) for cells in zip(*map(CHANGES.__getitem__, failed)))
            broken.setdefault(tuple(cells), []).append(setting)
    tables = {"refused": sorted(refused.items()), "broken": sorted(broken.items(), key=lambda row: len(row[0][0]))}
    rows = {
        name: "\n".join(f"| {as_written(settings)} | {' | '.join(cells)} |" for cells, settings in table)
        for name, table in tables.items()
    }
    return PAGE.format(values=len(SETTINGS), options=len({setting.option for setting in SETTINGS}), **rows)


PAGE = """# Options

`python tests/helpers/survey.py` writes this page, and a test keeps it true. It turns on {values} values of {options}
options of a decoder and its wrappers, with plain rotary embeddings and with xPos. The output must not change
with what follows a token, the KV cache, `mems`, the other rows of a batch, shifted positions, left padding, or padding
of a context. Wherever plain rotary passes, xPos passes. Options that are not on this page pass everything, except those
that need one that is. `[cross_]attn_…` stands for `attn_…` and `cross_attn_…`.

## Refused

| option | when | error |
|---|---|---|
{refused}

## Broken with every rotary embedding

| option | the output changes with | what to do |
|---|---|---|
{broken}

Padding between prepended embeddings and text changes nothing [if `pos` skips it](recipes.md#padding-in-the-middle).
"""


if __name__ == "__main__":
    write_record()
    DOCUMENT.write_text(page(read_record()), encoding="utf-8")
