"""That the fork can take the place of upstream's package and give it back: what is not xPos is the same, bit for bit.

The unpatched release is imported beside the fork, in the same process.
"""

from __future__ import annotations

import ast
import inspect
import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pristine
import pytest
import strategies
import survey
import torch
from hypothesis import given
from hypothesis import strategies as st
from pristine import build_both, pristine_imports, pristine_strategies
from strategies import OPTIONS, SMALL, decoder_options, few, gradients, seeds, splits, tokens
from survey import ENTRIES, MEASURES, PLAIN, Entry, Scene
from torch import Tensor
from torch.nn import Module
from ways import assert_equal_to_rounding

import x_transformers

PACKAGES = (x_transformers, pristine.MODULES["x_transformers"])

with pristine_imports():
    import survey as pristine_survey


def test_they_are_two_packages() -> None:
    assert pristine_strategies.Decoder is not strategies.Decoder
    assert pristine_strategies.Decoder.forward.__code__.co_filename.startswith(str(pristine.PRISTINE))
    assert strategies.Decoder.forward.__code__.co_filename.startswith(str(Path(x_transformers.__file__).parent))
    assert "rotary_window" not in inspect.signature(pristine_strategies.Decoder.forward).parameters


# without xPos, not a bit differs


def assert_same_bits(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def answers_of_option(run: Any, measures: Any) -> list[Tensor]:
    """What it gives in every way that it can be called, as far as it gets in each, and gradients."""
    found = [run.full, *run.model.state_dict().values()]
    for name in ("decode", "chunks", "mems", "rowpos", "pad"):
        try:
            for out, _ in measures[name](run):
                found.append(out)
        except Exception as error:  # it cannot do this with the option
            found.append(torch.tensor(list(type(error).__name__.encode())))
    run.model.requires_grad_(True)
    out, _ = run.forward(Scene())
    return [*found, *(gradients(run.model, out) if out.requires_grad else [])]


# upstream fails with them: an empty context with positions, and one whose einx pattern has a dimension too few
NO_ANSWER = {"forward.context", "attn_cope_soft_onehot_pos"}
COMPARABLE = [e for e in ENTRIES.values() if not e.added and not all(setting.fails for setting in e.settings)]


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.option) for e in COMPARABLE])
def test_every_option_without_xpos_is_bit_identical(entry: Entry) -> None:
    for ours, theirs in zip(entry.settings, pristine_survey.ENTRIES[entry.option].settings):
        if ours.fails:
            continue
        try:
            with pristine_imports():
                run = pristine_survey.Run(theirs, pristine_survey.build(theirs.words, PLAIN))
        except Exception:
            assert entry.option in NO_ANSWER
            continue
        own = survey.Run(ours, survey.build(ours.words, PLAIN))
        assert [*own.model.state_dict()] == [*run.model.state_dict()]
        assert_same_bits(answers_of_option(own, MEASURES), answers_of_option(run, pristine_survey.MEASURES))


# in other dtypes too, for what has something to do with rotary embeddings
POSITIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "rotary": dict(rotary_pos_emb=True),
    "interpolated": dict(rotary_pos_emb=True, rotary_interpolation_factor=2.5, attn_flash=True),
    "rescaled": dict(rotary_pos_emb=True, rotary_base_rescale_factor=4.0, heads=4, attn_kv_heads=2),
    "memory": dict(rotary_pos_emb=True, attn_num_mem_kv=2, attn_qk_norm=True),
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_models_without_xpos_are_bit_identical(positions: str, dtype: torch.dtype) -> None:
    x, found = tokens(0, 2, 9), []

    for model, package in zip(build_both({**SMALL, **POSITIONS[positions]}, 0, dtype, max_mem_len=64), PACKAGES):
        wrapper = package.AutoregressiveWrapper(model)
        _, cache = model(x[:, :5], return_intermediates=True)
        out = [t for inter in cache.attn_intermediates for t in inter.cached_kv]
        out += [model(x, cache=cache, cache_age=4), model(x[:, 5:], mems=model(x[:, :5], return_mems=True)[1])]
        out += [wrapper.generate(x, 3, temperature=0.0, cache_kv=cache_kv) for cache_kv in (True, False)]
        # past the window, from within it and from beyond it, of one length or two
        lens = torch.tensor([9, 4])
        for window in (4, 10) if positions != "none" else ():  # absolute positions end there
            wrapper.max_seq_len = window
            out += [wrapper.generate(x, 5, temperature=0.0, prompt_lens=each) for each in (None, lens)]
        wrapper.max_seq_len = model.max_seq_len
        model.requires_grad_(True)
        loss = wrapper(x)
        found.append([*out, loss.detach(), *gradients(model, loss)])

    assert_same_bits(*found)


# state dicts and whole models go both ways


@pytest.mark.parametrize("positions", ["none", "rotary", "memory", "xpos"])
def test_what_is_saved_of_one_loads_in_the_other(positions: str) -> None:
    x, options = tokens(7, 2, 33), {**SMALL, **POSITIONS.get(positions, OPTIONS)}
    models, others = (build_both(options, seed, torch.float32) for seed in (7, 8))
    assert_same_bits(*({**model.state_dict()} for model in models))
    assert [name for name, _ in models[0].named_buffers()] == [name for name, _ in models[1].named_buffers()]
    for other, model in zip(others, reversed(models)):
        other.load_state_dict(model.state_dict(), strict=True)

    imports: tuple[Callable[[], Any], ...] = (nullcontext, pristine_imports)  # pickle finds classes by name
    for model, saving in zip(models, imports):
        saved = io.BytesIO()
        with saving():
            torch.save(model, saved)
        for own, loaded, loading in zip(models, others, imports):
            saved.seek(0)
            with loading():
                other = torch.load(saved, weights_only=False)
            assert type(other) is type(own)
            # upstream takes its angles from buffers in float32 and from absolute positions, up to 33: each is off by
            # 33 half ulps, the scores by 2 ** 6 times that, and there are two layers
            is_rounded = positions == "xpos" and own is not model
            tolerance = 33 * 2**7 * torch.finfo(torch.float32).eps if is_rounded else 0
            for actual in (other(x), loaded(x)):
                assert (actual - model(x)).abs().max() <= tolerance * model(x).abs().max()


# with xPos, what upstream gets right is the same to rounding


def answers(model: Any, x: Tensor, num_new: int) -> list[Tensor]:
    """Of the whole, of the last tokens with a cache or the mems of the others, and gradients."""
    first, rest = x[:, :-num_new], x[:, -num_new:]
    _, cache = model(first, return_intermediates=True)
    found = [model(x), model(x, cache=cache, cache_age=num_new), model(rest, mems=model(first, return_mems=True)[1])]
    model.requires_grad_(True)
    return [*found, *gradients(model, model(x))]


def assert_agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert_equal_to_rounding(ours.detach(), theirs.detach())


ATTRIBUTES = ["scale_base", "inv_freq", "scale", "interpolation_factor"]


@few
@given(decoder_options(), seeds, splits(), st.sets(st.sampled_from(ATTRIBUTES)), st.sampled_from([2.0, 0.5]))
def test_with_xpos_self_attention_agrees_to_rounding_whatever_is_set_on_a_model(options, seed, lens, names, factor):
    x, num_new, found = tokens(seed, 2, sum(lens)), sum(lens[1:]), []
    models = build_both(options, seed, max_mem_len=64)
    exact = models[1].attn_layers.rotary_pos_emb
    frequencies, decays = exact.inv_freq.clone(), exact.scale.clone()

    for model in models:
        model(x)  # nothing of it may be remembered
        rotary = model.attn_layers.rotary_pos_emb
        new = dict(scale_base=factor * rotary.scale_base, interpolation_factor=6.0 * factor, scale=0.75 * decays)
        for name in names & new.keys():
            setattr(rotary, name, new[name])
        if "inv_freq" in names:
            rotary.inv_freq.copy_(factor * frequencies)
        found.append(answers(model, x, num_new))

    assert_agree(*found)


class OtherRotary(Module):
    """Positional embeddings of one's own, in place of upstream's: it takes what upstream passes, and no more."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.dim = 0.25, dim

    def forward(self, t: Tensor) -> tuple[Tensor, float]:
        return t[None, :, None] * torch.linspace(0, 1, self.dim // 2).repeat_interleave(2).double(), 1.0


@few
@given(decoder_options(), seeds, splits())
def test_a_rotary_embedding_of_ones_own_is_called_as_upstream_calls_it(options, seed, lens):
    x, found = tokens(seed, 2, sum(lens)), []

    for model in build_both(options, seed, max_mem_len=64):
        model.attn_layers.rotary_pos_emb = OtherRotary(options["rotary_emb_dim"])
        found.append(answers(model, x, sum(lens[1:])))

    assert_agree(*found)


class OtherAttention(Module):
    """An attention of one's own around upstream's, with the tables that it is given, or one for each head of them."""

    def __init__(self, attention: Module) -> None:
        super().__init__()
        self.attention, self.how = attention, ""

    def forward(self, x: Tensor, *, rotary_pos_emb: Any, **kwargs: Any) -> Any:
        assert all(t.is_floating_point() for t in rotary_pos_emb)
        tables: Any = tuple(t[:, None] if self.how == "per head" else t.clone() for t in rotary_pos_emb)
        if self.how == "moved":  # as FSDP and accelerate do with a named tuple
            tables = type(rotary_pos_emb)(*tables)
        return self.attention(x, rotary_pos_emb=tables, **kwargs)


@few
@given(decoder_options(), st.integers(0, 2), seeds, splits())
def test_a_layer_of_ones_own_is_given_angles_and_scales(options, num_mem_kv, seed, lens):
    x, options = tokens(seed, 2, sum(lens)), {**options, "attn_num_mem_kv": num_mem_kv}
    model = strategies.build(options, seed, max_mem_len=64)
    expected = answers(model, x, sum(lens[1:]))

    layers = [layer for layer in model.attn_layers.layers if isinstance(layer[1], x_transformers.Attention)]
    for layer in layers:
        layer[1] = OtherAttention(layer[1])
    for how in ("", "moved"):
        for layer in layers:
            layer[1].how = how
        model.requires_grad_(False)
        assert_agree(answers(model, x, sum(lens[1:])), expected)
    for layer in layers:
        layer[1].how = "per head"
    assert_agree([model(x)], expected[:1])


@given(st.sampled_from([3, 8, 33, 64]), seeds, st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_a_rotary_embedding_on_its_own_means_what_it_means_upstream(dim, seed, num_queries, num_keys, one_table):
    """One table for the queries and one for the keys, or one for both."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, n, 66, generator=generator, dtype=torch.float64) for n in (num_queries, num_keys))
    scores = []

    for package in PACKAGES:
        module = package.x_transformers
        rotary = module.RotaryEmbedding(dim, use_xpos=True).double()
        ratio = torch.arange(0, dim, 2).double() / dim
        rotary.inv_freq, rotary.scale = 10_000.0**-ratio, (ratio + 0.4) / 1.4
        (q_freqs, q_scale), (k_freqs, k_scale) = (
            rotary.forward_from_seq_len(max(num_queries, num_keys) if one_table else n) for n in (num_queries, num_keys)
        )
        rotate = module.apply_rotary_pos_emb
        scores.append(rotate(q, q_freqs, q_scale) @ rotate(k, k_freqs, k_scale**-1).mT)

    assert_equal_to_rounding(*scores)


@pytest.mark.parametrize(("dim_head", "rotary_emb_dim"), [(9, 8), (70, 35), (35, 32), (16, 7), (66, 33)])
def test_odd_dims_agree_with_upstream_to_rounding(dim_head, rotary_emb_dim):
    options = {**OPTIONS, "attn_dim_head": dim_head, "rotary_emb_dim": rotary_emb_dim}

    assert_agree(*(answers(model, tokens(0, 2, 30), 10) for model in build_both(options, 0, max_mem_len=64)))


# signatures


def signatures(package: ModuleType) -> dict[str, str]:
    """Of every function and method of every module, by its path, as it is written."""
    found = {}
    for path in sorted(Path(str(package.__file__)).parent.glob("*.py")):
        for owner in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(owner, (ast.Module, ast.ClassDef)):
                methods = [node for node in owner.body if isinstance(node, ast.FunctionDef)]
                where = f"{path.stem}.{getattr(owner, 'name', '')}"
                found.update({f"{where}.{method.name}": ast.unparse(method.args) for method in methods})
    return found


def test_every_callable_accepts_what_upstreams_accepts() -> None:
    ours, theirs = map(signatures, PACKAGES)

    assert len(theirs) > 400
    assert {*vars(PACKAGES[1])} <= {*vars(x_transformers)}
    assert theirs.keys() <= ours.keys()
    changed = {name: ours[name] for name in theirs if ours[name] != theirs[name]}
    # what is added comes last, and may be left out
    added = {
        "x_transformers.RotaryEmbedding.forward": "seq_len=None",
        "x_transformers.AttentionLayers.forward": "rotary_window: tuple[int, int] | None=None",
        "autoregressive_wrapper.AutoregressiveWrapper.generate": "cache=None",
    }
    expected = {}
    for path, argument in added.items():
        arguments, keywords, rest = theirs[path].partition(", **")
        expected[path] = f"{arguments}, {argument}{keywords}{rest}"
    assert changed == expected
