"""Every option of a decoder is classified, and xPos keeps with it what plain rotary has; see `xpos.survey`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from x_transformers import Attention, Decoder, FeedForward
from x_transformers import x_transformers as upstream
from x_transformers.x_transformers import AttentionLayers
from x_transformers.xpos import survey
from x_transformers.xpos.survey import BROKEN, ENTRIES, HOLDS, NOT_RUN, PLAIN_FAILS, REFUSED, Entry, Row, Setting

# refused by unpatched xPos as well; absolute positions, with which plain rotary has no shift invariance to lack; and
# what fails with plain rotary too, once it is called
NO_REGRESSION = {"causal", "disable_abs_pos_emb", "attn_cope_soft_onehot_pos"}


def params() -> list[Any]:
    def marks(entry: Entry) -> list[pytest.MarkDecorator]:
        compared = [setting for setting in entry.settings if not setting.fails]
        if not compared or entry.option in NO_REGRESSION:
            return []
        if entry.added:
            return [pytest.mark.regression("no argument")]
        return [pytest.mark.regression("not refused" if compared[0].refused else "differs")]

    return [pytest.param(entry, id=entry.option, marks=marks(entry)) for entry in ENTRIES.values()]


def test_every_option_is_classified():
    assert survey.unclassified() == []


def test_every_entry_is_about_an_option():
    assert survey.stale() == []


def test_an_option_that_upstream_adds_is_unclassified():
    class Layers(AttentionLayers):
        def __init__(self, dim, made_up_layers=None, **kwargs):
            super().__init__(dim, **kwargs)

        def forward(self, x, made_up_call=None, **kwargs):
            return super().forward(x, **kwargs)

    class Attends(Attention):
        def __init__(self, dim, made_up_attention=None, **kwargs):
            super().__init__(dim, **kwargs)

    class Feeds(FeedForward):
        def __init__(self, dim, made_up_feedforward=None, **kwargs):
            super().__init__(dim, **kwargs)

    assert survey.unclassified(Layers, Attends, Feeds) == [
        "made_up_layers",
        "attn_made_up_attention",
        "cross_attn_made_up_attention",
        "ff_made_up_feedforward",
        "forward.made_up_call",
    ]


def test_an_entry_about_no_option_is_stale(monkeypatch):
    monkeypatch.setattr(survey, "ENTRIES", {**ENTRIES, "made_up": Entry("made_up", reason="none")})

    assert survey.stale() == ["made_up"]


@pytest.mark.parametrize("entry", params())
def test_xpos_keeps_what_plain_rotary_has(entry):
    for setting, row in zip(entry.settings or (Setting(""),), survey.rows_of(entry)):
        assert row.verdict == expected_verdict(entry, setting), f"{row.option}={row.value}: {row.note}"
        if row.verdict == HOLDS:
            # one that changes nothing without a reason is not turned on
            assert row.effect is not bool(setting.inert), f"{row.option}={row.value}: effect {row.effect}"


def expected_verdict(entry: Entry, setting: Setting) -> str:
    if not entry.settings:
        return NOT_RUN
    if setting.fails:
        return PLAIN_FAILS
    return REFUSED if setting.refused else HOLDS


@pytest.mark.parametrize(
    ("option", "value", "when"),
    [
        pytest.param("attn_l2_distance", "True", "when built", marks=pytest.mark.regression),
        pytest.param("attn_use_cope", "True", "when built", marks=pytest.mark.regression),
        ("causal", "False", "when built"),
        # known only in the call
        pytest.param("cross_attn_l2_distance", "True, context_pos", "when called", marks=pytest.mark.regression),
        pytest.param("forward.causal", "False", "when called", marks=pytest.mark.regression),
        pytest.param("forward.rotary_pos_emb", "table, context_pos", "when called", marks=pytest.mark.regression),
    ],
)
def test_what_is_refused_is_named(option, value, when):
    rows = {row.value: row for row in survey.rows_of(ENTRIES[option])}
    name = option.rpartition(".")[2]

    assert rows[value].verdict == REFUSED
    assert rows[value].note.startswith(when)
    if option not in ("causal", "cross_attn_l2_distance"):  # upstream's words, and those of all l2 distance attention
        assert f"`{name}" in rows[value].note


@pytest.mark.parametrize(
    "option",
    [entry.option for entry in ENTRIES.values() if entry.reason == survey.GIVEN],
)
def test_what_attention_layers_give_cannot_be_passed_as_well(option):
    cross = option.startswith("cross_")

    with pytest.raises(TypeError, match="multiple values"):
        Decoder(dim=8, depth=1, rotary_pos_emb=True, cross_attend=cross, verbose=False, **{option: 1})


# combinations

SETTINGS = [
    (entry.option, setting)
    for entry in ENTRIES.values()
    for setting in entry.settings
    if not (setting.fails or setting.refused or entry.added)
]


@given(st.lists(st.sampled_from(SETTINGS), min_size=2, max_size=3, unique_by=lambda pair: pair[0]))
@settings(max_examples=80)
@pytest.mark.regression
def test_xpos_keeps_what_plain_rotary_has_with_several_options(pairs):
    combined = survey.combine(*(setting for _, setting in pairs))
    assume(combined is not None)

    row = survey.examine(combined)

    event(row.verdict)
    assert row.verdict in (REFUSED if combined.refused else HOLDS, PLAIN_FAILS), row.note


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
    options = [option for option in ENTRIES if not option.startswith("cross_")][::5]

    rows = [row for option in options for row in survey.rows_of(ENTRIES[option]) if row.plain]
    seen = [row for row in rows if row.verdict == BROKEN]

    assert len(seen) > 0.9 * len(rows) > 20


@pytest.mark.parametrize("option", ["attn_num_mem_kv", "forward.self_attn_additional_kv"])
def test_keys_without_a_position_that_are_not_rotated_break_prefix_consistency(monkeypatch, option):
    monkeypatch.setattr(upstream, "apply_null_xpos", lambda k, **_: k)

    row = next(survey.rows_of(ENTRIES[option]))

    assert "prefix" in row.broken


@pytest.mark.regression
@pytest.mark.parametrize(
    ("option", "prop"),
    [
        ("attn_num_mem_kv", "prefix"),
        ("forward.self_attn_additional_kv", "prefix"),
        ("forward.context_pos", "context"),
        ("forward.context_pos", "prefix"),
        ("depth", "rowpos"),
    ],
)
def test_what_the_unpatched_release_lacks(option, prop):
    for row in survey.rows_of(ENTRIES[option]):
        assert row.plain[prop].holds
        assert row.xpos[prop].holds


# output


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    options = ("dim", "alibi_pos_bias", "rel_pos_bias", "attn_flash_pack_seq", "attn_use_cope", "cross_attend")
    return [row for option in options for row in survey.rows_of(ENTRIES[option])]


def test_the_survey_is_told_of_and_keeps_the_order(monkeypatch):
    chosen = {option: ENTRIES[option] for option in ("dim", "attn_flash_pack_seq")}
    monkeypatch.setattr(survey, "ENTRIES", chosen)
    told: list[str] = []

    found = survey.survey(told.append)

    assert told == [row.option for row in found] == list(chosen)


def test_the_table_fits_110_columns(rows):
    broken = Row("made_up", "True", BROKEN, rows[0].plain, {}, "prefix: 1.0e+00 apart; " * 9)

    lines = survey.format_table([*rows, broken]).splitlines()

    assert max(map(len, lines)) <= 110
    assert len([line for line in lines if line.startswith("cross_attend=True")]) == 2
    assert any(line.startswith("made_up=True") and " x " in line for line in lines)
    assert any("BROKEN made_up=True: prefix: 1.0e+00 apart" in line for line in lines)
    assert lines[-1].endswith(f"of {len(rows) + 1} values of 7 options BROKEN")


@pytest.mark.regression
def test_the_table_says_what_holds(rows):
    lines = {line.split(" ")[0]: line for line in survey.format_table(rows).splitlines()}

    assert lines["dim=24"].split()[1:] == ["="] * 8
    assert lines["alibi_pos_bias=True"].split()[1:] == ["=", "-", "-", "-", "=", "=", "=", "="]
    assert "plain fails: " in lines["rel_pos_bias=True"]
    assert "not run: needs the library" in lines["attn_flash_pack_seq"]
    assert "refused: when built" in lines["attn_use_cope=True"]


def test_the_document_is_json_and_complete(rows):
    found = json.loads(survey.document(rows))

    assert [row["option"] for row in found["rows"]] == [row.option for row in rows]
    assert set(found["rows"][0]["plain"]) == set(survey.PROPERTIES) - {"context"}
    assert found["unclassified"] == []
    assert found["passed"] == all(row.passed for row in rows)
