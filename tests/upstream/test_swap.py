"""With xPos the fork gives to rounding what upstream gives where it is right, and takes whatever upstream takes.

The unpatched release is imported beside the fork. What is not xPos is compared in every_line/test_without_xpos.py.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pristine
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from pristine import build_both, pristine_strategies
from strategies import OPTIONS, decoder_options, few, gradients, seeds, splits, tokens
from torch import Tensor
from torch.nn import Module
from ways import assert_equal_to_rounding, keys_values

import x_transformers

PACKAGES = (x_transformers, pristine.MODULES["x_transformers"])


def test_they_are_two_packages() -> None:
    modules = (strategies, pristine_strategies)
    files = [Path(module.Decoder.forward.__code__.co_filename).parent for module in modules]
    assert files == [Path(x_transformers.__file__).parent, pristine.PRISTINE / "x_transformers"]


# with xPos, what upstream gets right is the same to rounding


def answers(model: Any, x: Tensor, num_new: int) -> list[Tensor]:
    """Of the whole, of the last tokens with a cache or the mems of the others, and gradients."""
    first, rest = x[:, :-num_new], x[:, -num_new:]
    _, cache = model(first, return_intermediates=True)
    found = [model(x), model(x, cache=cache, cache_age=num_new), *keys_values(cache)]
    found.append(model(rest, mems=model(first, return_mems=True)[1]))
    model.requires_grad_(True)
    return [*found, *gradients(model, model(x))]


def assert_agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert_equal_to_rounding(ours.detach(), theirs.detach())


def assert_both_agree(models: Any, seed: int, lens: list[int], change: Callable[[Any], None] = lambda _: None) -> None:
    """A model of the fork and one of upstream, once something is changed on both."""
    x, found = tokens(seed, 2, sum(lens)), []
    for model in models:
        model(x)  # nothing of it may be remembered
        change(model)
        found.append(answers(model, x, sum(lens[1:])))
    assert_agree(*found)


ATTRIBUTES = ["scale_base", "inv_freq", "scale", "interpolation_factor"]


@few
@given(decoder_options(), seeds, splits(), st.sets(st.sampled_from(ATTRIBUTES)), st.sampled_from([2.0, 0.5]))
def test_with_xpos_self_attention_agrees_to_rounding_whatever_is_set_on_a_model(options, seed, lens, names, factor):
    models = build_both(options, seed, max_mem_len=64)
    exact = models[1].attn_layers.rotary_pos_emb
    frequencies, decays = exact.inv_freq.clone(), exact.scale

    def change(model: Any) -> None:
        rotary = model.attn_layers.rotary_pos_emb
        new = dict(scale_base=factor * rotary.scale_base, interpolation_factor=6.0 * factor, scale=0.75 * decays)
        for name in names & new.keys():
            setattr(rotary, name, new[name])
        if "inv_freq" in names:
            rotary.inv_freq.copy_(factor * frequencies)

    assert_both_agree(models, seed, lens, change)


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
    own, models = OtherRotary(options["rotary_emb_dim"]), build_both(options, seed, max_mem_len=64)
    assert_both_agree(models, seed, lens, lambda model: setattr(model.attn_layers, "rotary_pos_emb", own))


class OtherAttention(Module):
    """An attention of one's own around upstream's, with tables made of those that it is given."""

    def __init__(self, attention: Module, how: Callable[[Any], Any]) -> None:
        super().__init__()
        self.attention, self.how = attention, how

    def forward(self, x: Tensor, *, rotary_pos_emb: Any, **kwargs: Any) -> Any:
        assert all(t.is_floating_point() for t in rotary_pos_emb)
        return self.attention(x, rotary_pos_emb=self.how(rotary_pos_emb), **kwargs)


@few
@given(decoder_options(), st.integers(0, 2), seeds, splits())
def test_a_layer_of_ones_own_is_given_angles_and_scales(options, num_mem_kv, seed, lens):
    x, options, num_new = tokens(seed, 2, sum(lens)), {**options, "attn_num_mem_kv": num_mem_kv}, sum(lens[1:])

    def changed(how: Callable[[Any], Any]) -> Any:
        model = strategies.build(options, seed, max_mem_len=64)
        for layer in model.attn_layers.layers[::2]:
            layer[1] = OtherAttention(layer[1], how)
        return model

    expected = answers(strategies.build(options, seed, max_mem_len=64), x, num_new)
    # a tuple of one's own, and as FSDP and accelerate do with a named tuple
    for how in (lambda tables: tuple(map(torch.clone, tables)), lambda tables: type(tables)(*map(torch.clone, tables))):
        assert_agree(answers(changed(how), x, num_new), expected)
    one_for_each_head = changed(lambda tables: tuple(t[:, None] for t in tables))
    assert_agree([one_for_each_head(x)], expected[:1])


@pytest.mark.parametrize(("dim_head", "rotary_emb_dim"), [(9, 8), (70, 35), (35, 32), (16, 7), (66, 33)])
def test_odd_dims_agree_with_upstream_to_rounding(dim_head, rotary_emb_dim):
    options = {**OPTIONS, "attn_dim_head": dim_head, "rotary_emb_dim": rotary_emb_dim}
    assert_both_agree(build_both(options, 0, max_mem_len=64), 0, [20, 10])


# signatures


def signatures(package: ModuleType) -> dict[str, str]:
    """Of every function and method of every module, by its path, as it is written."""
    return {
        f"{path.stem}.{getattr(owner, 'name', '')}.{node.name}": ast.unparse(node.args)
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py"))
        for owner in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for node in (owner.body if isinstance(owner, (ast.Module, ast.ClassDef)) else ())
        if isinstance(node, ast.FunctionDef)
    }


def test_every_callable_accepts_what_upstreams_accepts() -> None:
    ours, theirs = map(signatures, PACKAGES)

    assert len(theirs) > 400
    assert {*vars(PACKAGES[1])} <= {*vars(x_transformers)}
    # what is added comes last, and may be left out
    added = {
        "x_transformers.RotaryEmbedding.forward": "seq_len=None",
        "x_transformers.AttentionLayers.forward": "rotary_window: tuple[int, int] | None=None",
        "autoregressive_wrapper.AutoregressiveWrapper.generate": "cache=None",
    }
    for name, argument in added.items():
        before, _, after = ours[name].partition(f", {argument}")
        assert after in ("", ", **kwargs")
        ours[name] = before + after
    assert theirs.items() <= ours.items()
