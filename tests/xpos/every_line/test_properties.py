"""What a causal model's answer may not depend on: the properties of the check, on generated models of every line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import survey
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import IS_OLDER, build, decoder_options, few, gradients, seeds, shifts, splits, tokens
from ways import Exact, assert_equal_to_rounding, randn

from x_transformers import ContinuousTransformerWrapper
from x_transformers.xpos.checker import properties, runs
from x_transformers.xpos.checker.models import Model, Text
from x_transformers.xpos.checker.properties import Point, Property, deviation
from x_transformers.xpos.checker.runs import Case, Plan
from x_transformers.xpos.release import accepts

# the older release raises a NameError whatever is called
pytestmark = [pytest.mark.regression] * IS_OLDER


def decoding_behind_mems(case: Case) -> Iterator[Point]:
    """https://github.com/lucidrains/x-transformers/issues/233"""
    for first, *_ in case.plan.segments:
        _, mems = runs.segment(case.model, case.text.part(0, first), None)
        rest = case.text.part(first, case.max_len)
        for only_new in {False, accepts("input_not_include_cache")}:
            out = runs.token_by_token(case.model, rest, first + 1, only_new=only_new, mems=mems)
            yield Point(case.max_len, deviation(out, case.full[:, first:]))


def prepended(case: Case) -> Iterator[Point]:
    embedded, first = case.model.module.token_emb(case.text.main), case.plan.lengths[0]
    rest = case.text.part(first, case.max_len).main
    out = case.model.module(rest, prepend_embeds=embedded[:, :first], **case.text.per_row)
    yield Point(case.max_len, deviation(out, case.full))


OF_WRAPPERS = [
    Property("mems-cached", "one call, and decoding behind mems", decoding_behind_mems, "segments"),
    Property("prepended", "one call, and its first embeddings prepended", prepended, "calls"),
]
OF_ANY = [prop for prop in properties.ALL if prop.variant is None and (not prop.needs or accepts(prop.needs))]


def param(prop: Property):
    fails = prop.key in ("prefix", "cached-whole", "cached-new", "chunked", "shift", "range")
    return pytest.param(prop, id=prop.key, marks=[pytest.mark.regression] * fails)


def continuous(model: Any) -> Any:
    sizes: dict[str, Any] = dict(dim_in=3, dim_out=3, max_seq_len=64, max_mem_len=64, use_abs_pos_emb=False)
    return ContinuousTransformerWrapper(**sizes, attn_layers=model.attn_layers).double().eval()


# what wraps a decoder, and the size of a token in it, if it is none by its id
WRAPPERS = {
    "TransformerWrapper": (lambda model: model, None),
    "ContinuousTransformerWrapper": (continuous, 3),
    "Decoder": (lambda model: model.attn_layers, 16),
}


@pytest.mark.parametrize("prop", [param(prop) for prop in (*OF_ANY, *OF_WRAPPERS)])
@few
@given(decoder_options(max_mem_kv=3), seeds, seeds, splits(), shifts, st.sampled_from([*WRAPPERS]), st.booleans())
def test_property(prop, options, seed, text_seed, lens, shift, name, cross):
    assume(prop.key != "range" or sum(lens) >= 8)  # else its limit is below 1
    # memory keys stay where they are when positions move, or padding comes before them
    if prop.key in ("mems", "mems-cached", "shift", "padded"):
        options["attn_num_mem_kv"] = 0
    # upstream's other wrappers cannot do these, with any positions
    is_of_one = prop in OF_WRAPPERS or prop.key == "padded"
    wrap, size = WRAPPERS["TransformerWrapper" if is_of_one else name]
    options.update(dim=16, cross_attend=cross)
    module, total = wrap(build(options, seed, max_mem_len=64)), sum(lens)
    data = tokens(text_seed, 2, total) if size is None else randn(text_seed, 2, total, size)
    text = Text(data, {"context": randn(seed, 2, 5, 16)} if cross else {})
    plan = Plan((lens[0], total), (lens[-1],), (tuple(lens),), total - lens[0], (-shift, shift))

    case = Exact(Model(module), text, plan)
    assert getattr(case.model, prop.lacked, "") or not case.failure(prop)


@given(decoder_options(), seeds, seeds, splits())
def test_gradients_do_not_depend_on_what_follows(options, seed, data_seed, lens):
    x = tokens(data_seed, 2, sum(lens))
    model = build(options, seed).requires_grad_(True)

    for prefix, full in zip(gradients(model, model(x[:, : lens[0]])), gradients(model, model(x)[:, : lens[0]])):
        assert_equal_to_rounding(prefix, full)


@pytest.mark.skipif(not IS_OLDER, reason="test_options.py has a test for each option, and what is found about it")
def test_xpos_keeps_what_plain_rotary_has_with_every_option_of_the_older_line():
    verdicts = {setting.name: survey.examine(setting) for setting in survey.SETTINGS if survey.is_known(setting)}

    broken = [f"{name}: {note}" for name, (verdict, note) in verdicts.items() if verdict == survey.BROKEN]
    assert not broken, broken
    assert [verdict for verdict, _ in verdicts.values()].count(survey.HOLDS) > 75
