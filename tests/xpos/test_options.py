"""Every option of a decoder is classified, and xPos keeps with it what plain rotary has; see `survey`."""

from __future__ import annotations

import pytest
import survey
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import few
from survey import ADDED, BROKEN, HOLDS, PLAIN_FAILS, REASONS, REFUSED, SETTINGS

from x_transformers import Decoder, FeedForward
from x_transformers import x_transformers as upstream

# what is wrong in the unpatched release because of the option: all others are only where rows of a batch are far apart
REGRESSIONS = {
    "depth": "differs",
    "attn_num_mem_kv": "differs",
    "forward.self_attn_additional_kv": "differs",
    "forward.context_pos": "differs",
    "forward.rotary_pos_emb": "differs",
    "attn_l2_distance": "not refused",
    "attn_use_cope": "not refused",
    "cross_attn_l2_distance=context_pos": "not refused",
    "forward.causal=False": "not refused",
    "forward.rotary_window": "no argument",
}
FOUND, UPDATE = survey.read_record(), "run python tests/helpers/survey.py"


def test_every_option_is_classified_and_every_entry_is_about_one(monkeypatch):
    class Feeds(FeedForward):
        def __init__(self, dim, made_up=None, **kwargs):
            super().__init__(dim, **kwargs)

    classified = {setting.option for setting in SETTINGS} | {*REASONS}
    of_decoders = {name for name in classified if not name.startswith("wrapper.")}
    assert {*survey.options(), ADDED} == of_decoders

    monkeypatch.setattr(survey, "FeedForward", Feeds)
    assert {*survey.options()} - of_decoders == {"ff_made_up"}


def param(setting: survey.Setting):
    reasons = [REGRESSIONS[key] for key in {setting.name, setting.option} & REGRESSIONS.keys()]
    return pytest.param(setting, id=setting.name, marks=[pytest.mark.regression(reason) for reason in reasons])


@pytest.mark.parametrize("setting", [param(setting) for setting in SETTINGS])
def test_xpos_keeps_what_plain_rotary_has(setting):
    verdict, note = survey.examine(setting)
    expected = PLAIN_FAILS if setting.fails else REFUSED if setting.refused else HOLDS
    assert verdict == expected, f"{setting.name}: {note}"
    # else a mistake in a setting would hide what it is about
    assert setting.fails in note
    if verdict == HOLDS:
        # one that changes nothing without a reason is not turned on
        assert survey.changes_something(setting) is not bool(setting.inert)
    assert FOUND[setting.name] == f"{verdict}: {note}", UPDATE


def test_the_page_says_what_was_found_about_every_option():
    assert FOUND.keys() == {setting.name for setting in SETTINGS}, UPDATE
    assert survey.DOCUMENT.read_text(encoding="utf-8") == survey.page(FOUND), UPDATE


@pytest.mark.parametrize("option", [name for name, reason in REASONS.items() if reason == survey.GIVEN])
def test_what_attention_layers_give_cannot_be_passed_as_well(option):
    cross = option.startswith("cross_")

    with pytest.raises(TypeError, match="multiple values"):
        Decoder(dim=8, depth=1, rotary_pos_emb=True, cross_attend=cross, verbose=False, **{option: 1})


ACCEPTED = [each for each in SETTINGS if not (each.fails or each.refused or each.option == ADDED)]


@few
@given(st.lists(st.sampled_from(ACCEPTED), min_size=2, max_size=3, unique_by=lambda s: s.option))
@pytest.mark.regression
def test_xpos_keeps_what_plain_rotary_has_with_several_options(several):
    combined = survey.combine(*several)
    assume(combined is not None)
    assert combined is not None  # for the types

    verdict, note = survey.examine(combined)

    assert verdict in (HOLDS, PLAIN_FAILS), note


# the survey sees a bug


def test_keys_with_a_center_of_their_own_break_nearly_every_option(monkeypatch):
    rotate = upstream.apply_rotary_pos_emb

    def broken(t, freqs, scale):
        if not torch.is_tensor(scale):
            return rotate(t, freqs, scale)
        # that of keys grows with the position: by a distance that changes with the length
        first, last = scale[:, :1], scale[:, -1:]
        return rotate(t, freqs, scale * (first / last) ** 0.25 if (first < last).all() else scale)

    monkeypatch.setattr(upstream, "apply_rotary_pos_emb", broken)
    monkeypatch.setattr(upstream, "is_eager", lambda _: False)
    verdicts = [survey.examine(setting)[0] for setting in ACCEPTED[::24]]

    assert verdicts.count(BROKEN) > 0.9 * len(verdicts) > 10


def test_keys_without_a_position_that_are_not_rotated_break_prefix_consistency(monkeypatch):
    monkeypatch.setattr(upstream, "apply_null_xpos", lambda k, *_: k)

    without_position = ("attn_num_mem_kv=3", "forward.self_attn_additional_kv=added_kv")
    settings = [setting for setting in SETTINGS if setting.name in without_position]
    assert ["prefix" in survey.examine(setting)[1] for setting in settings] == [True, True]
