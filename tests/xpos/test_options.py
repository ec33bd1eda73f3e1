"""Every option of a decoder is classified, and xPos keeps with it what plain rotary has; see `survey`."""

from __future__ import annotations

import pytest
import survey
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import few
from survey import BROKEN, ENTRIES, HOLDS, PLAIN_FAILS, REFUSED

from x_transformers import Decoder, FeedForward
from x_transformers import x_transformers as upstream

# what is wrong in the unpatched release because of the option: all others are only where rows of a batch are far apart
REGRESSIONS = {
    "depth": "differs",
    "attn_num_mem_kv": "differs",
    "forward.self_attn_additional_kv": "differs",
    "forward.context_pos": "differs",
    "cross_attn_l2_distance": "differs",
    "forward.rotary_pos_emb": "differs",
    "attn_l2_distance": "not refused",
    "attn_use_cope": "not refused",
    "forward.causal": "differs",
    "forward.rotary_window": "no argument",
}
FOUND, UPDATE = survey.read_record(), "run python tests/helpers/survey.py"


def test_every_option_is_classified_and_every_entry_is_about_one(monkeypatch):
    class Feeds(FeedForward):
        def __init__(self, dim, made_up=None, **kwargs):
            super().__init__(dim, **kwargs)

    added = {entry.option for entry in ENTRIES.values() if entry.added}
    of_decoders = {name for name in ENTRIES if not name.startswith("wrapper.")}
    assert {*survey.options()} | added == of_decoders

    monkeypatch.setattr(survey, "FeedForward", Feeds)
    assert {*survey.options()} - of_decoders == {"ff_made_up"}


def param(option: str):
    marks = [pytest.mark.regression(REGRESSIONS[option])] if option in REGRESSIONS else []
    return pytest.param(ENTRIES[option], id=option, marks=marks)


@pytest.mark.parametrize("entry", [param(option) for option in ENTRIES])
def test_xpos_keeps_what_plain_rotary_has(entry):
    for setting, name in zip(entry.settings, survey.names_of(entry)):
        verdict, note = survey.examine(setting)
        expected = PLAIN_FAILS if setting.fails else REFUSED if setting.refused else HOLDS
        assert verdict == expected, f"{name}: {note}"
        # else a mistake in an entry would hide what it is about
        assert setting.fails in note
        if verdict == HOLDS:
            # one that changes nothing without a reason is not turned on
            assert survey.changes_something(setting) is not bool(setting.inert), name
        assert FOUND[name] == f"{verdict}: {note}", UPDATE


def test_the_page_says_what_was_found_about_every_option():
    assert FOUND.keys() == {name for entry in ENTRIES.values() for name in survey.names_of(entry)}, UPDATE
    assert survey.DOCUMENT.read_text(encoding="utf-8") == survey.page(FOUND), UPDATE


@pytest.mark.parametrize("option", [entry.option for entry in ENTRIES.values() if entry.reason == survey.GIVEN])
def test_what_attention_layers_give_cannot_be_passed_as_well(option):
    cross = option.startswith("cross_")

    with pytest.raises(TypeError, match="multiple values"):
        Decoder(dim=8, depth=1, rotary_pos_emb=True, cross_attend=cross, verbose=False, **{option: 1})


SETTINGS = [
    setting
    for entry in ENTRIES.values()
    for setting in entry.settings
    if not (setting.fails or setting.refused or entry.added)
]


@few
@given(st.lists(st.sampled_from(SETTINGS), min_size=2, max_size=3, unique_by=lambda s: s.name.partition("=")[0]))
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
    verdicts = [survey.examine(setting)[0] for setting in SETTINGS[::24]]

    assert verdicts.count(BROKEN) > 0.9 * len(verdicts) > 10


def test_keys_without_a_position_that_are_not_rotated_break_prefix_consistency(monkeypatch):
    monkeypatch.setattr(upstream, "apply_null_xpos", lambda k, *_: k)

    for option in ("attn_num_mem_kv", "forward.self_attn_additional_kv"):
        assert "prefix" in survey.examine(ENTRIES[option].settings[0])[1]
