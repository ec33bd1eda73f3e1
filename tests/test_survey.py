"""Every option of a decoder is classified, and xPos keeps with it what plain rotary has; see `survey`."""

from __future__ import annotations

import pytest
import survey
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from survey import BROKEN, ENTRIES, HOLDS, NOT_RUN, PLAIN_FAILS, REFUSED, Entry, Setting

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


def test_every_option_is_classified_and_every_entry_is_about_one(monkeypatch):
    class Feeds(FeedForward):
        def __init__(self, dim, made_up=None, **kwargs):
            super().__init__(dim, **kwargs)

    assert [name for name in survey.options() if name not in ENTRIES] == []
    added = {"forward.rotary_window"} if ENTRIES["forward.rotary_window"].added else set()
    assert [name for name in {*ENTRIES} - {*survey.options()} - added if not name.startswith("wrapper.")] == []

    monkeypatch.setattr(survey, "FeedForward", Feeds)
    assert [name for name in survey.options() if name not in ENTRIES] == ["ff_made_up"]


def params():
    def marks(option: str) -> list[pytest.MarkDecorator]:
        return [pytest.mark.regression(REGRESSIONS[option])] if option in REGRESSIONS else []

    return [pytest.param(entry, id=entry.option, marks=marks(entry.option)) for entry in ENTRIES.values()]


@pytest.mark.parametrize("entry", params())
def test_xpos_keeps_what_plain_rotary_has(entry):
    for setting, row in zip(entry.settings or (Setting(),), survey.rows_of(entry.option)):
        assert row.verdict == expected_verdict(entry, setting), f"{row.name}: {row.note}"
        # else a mistake in an entry would hide what it is about
        assert setting.fails in row.note
        if row.verdict == HOLDS:
            # one that changes nothing without a reason is not turned on
            assert row.effect is not bool(setting.inert), f"{row.name}: effect {row.effect}"


def expected_verdict(entry: Entry, setting: Setting) -> str:
    if not entry.settings:
        return NOT_RUN
    if setting.fails:
        return PLAIN_FAILS
    return REFUSED if setting.refused else HOLDS


@pytest.mark.parametrize("option", [entry.option for entry in ENTRIES.values() if entry.reason == survey.GIVEN])
def test_what_attention_layers_give_cannot_be_passed_as_well(option):
    cross = option.startswith("cross_")

    with pytest.raises(TypeError, match="multiple values"):
        Decoder(dim=8, depth=1, rotary_pos_emb=True, cross_attend=cross, verbose=False, **{option: 1})


SETTINGS = [
    (entry.option, setting)
    for entry in ENTRIES.values()
    for setting in entry.settings
    if not (setting.fails or setting.refused or entry.added)
]


@given(st.lists(st.sampled_from(SETTINGS), min_size=2, max_size=3, unique_by=lambda pair: pair[0]))
@pytest.mark.regression
def test_xpos_keeps_what_plain_rotary_has_with_several_options(pairs):
    combined = survey.combine(*(setting for _, setting in pairs))
    assume(combined is not None)

    row = survey.examine(combined)

    assert row.verdict in (REFUSED if combined.refused else HOLDS, PLAIN_FAILS), row.note


def test_the_page_is_true():
    assert survey.DOCUMENT.read_text(encoding="utf-8") == survey.document(), "run python tests/survey.py --write"


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
    tried = [setting for _, setting in SETTINGS[::12]]
    rows = [survey.examine(setting) for setting in tried]

    assert len([row for row in rows if row.verdict == BROKEN]) > 0.9 * len(rows) > 20


@pytest.mark.parametrize("option", ["attn_num_mem_kv", "forward.self_attn_additional_kv"])
def test_keys_without_a_position_that_are_not_rotated_break_prefix_consistency(monkeypatch, option):
    monkeypatch.setattr(upstream, "apply_null_xpos", lambda k, **_: k)

    assert "prefix" in survey.examine(ENTRIES[option].settings[0]).broken
