"""Without xPos the fork gives what upstream gives, bit for bit, on every line; saved models load both ways."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import survey
import torch
from pristine import MODULES, build_both, pristine_imports
from strategies import IS_OLDER, OPTIONS, SMALL, gradients, tokens
from survey import ADDED, PLAIN, SETTINGS, Setting
from ways import keys_values

import x_transformers

PACKAGES = (x_transformers, MODULES["x_transformers"])

with pristine_imports():
    import survey as pristine_survey


def assert_same_bits(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# upstream fails with them: an empty context with positions, and one whose einx pattern has a dimension too few
NO_ANSWER = {"forward.context", "attn_cope_soft_onehot_pos"}
THEIRS = {setting.name: setting for setting in pristine_survey.SETTINGS}
COMPARABLE = [each for each in SETTINGS if survey.is_known(each) and not each.fails and each.option != ADDED]


@pytest.mark.parametrize("setting", [pytest.param(setting, id=setting.name) for setting in COMPARABLE])
def test_every_option_is_bit_identical(setting: Setting) -> None:
    theirs = THEIRS[setting.name]
    try:
        with pristine_imports():
            expected = pristine_survey.case_of(theirs, pristine_survey.build(theirs.words, PLAIN))
    except Exception:
        assert IS_OLDER or setting.option in NO_ANSWER
        return
    actual = survey.case_of(setting, survey.build(setting.words, PLAIN))
    assert [*actual.model.module.state_dict()] == [*expected.model.module.state_dict()]
    assert_same_bits(survey.answers(actual), pristine_survey.answers(expected))


# in other dtypes, with absolute positions and rotary embeddings

MEMORY: dict[str, Any] = dict(rotary_pos_emb=True, attn_num_mem_kv=2, attn_qk_norm=True)
RESCALED = dict(rotary_pos_emb=True, rotary_interpolation_factor=2.5, rotary_base_rescale_factor=4.0, heads=4)
RESCALED.update(attn_kv_heads=2, attn_flash=True)


@pytest.mark.parametrize("options", [{}, RESCALED, MEMORY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_models_generate_and_train_bit_identically(options: dict[str, Any], dtype: torch.dtype) -> None:
    x, found = tokens(0, 2, 9), []

    for model, package in zip(build_both({**SMALL, **options}, 0, dtype, max_mem_len=64), PACKAGES):
        wrapper = package.AutoregressiveWrapper(model).eval()
        out = [wrapper.generate(x, 3, temperature=0.0, cache_kv=cache_kv) for cache_kv in (True, False)]
        # past the window, from within it and from beyond it, of one length or two
        for window in (4, 10) if options else ():  # absolute positions end there
            wrapper.max_seq_len = window
            for lens in (None, torch.tensor([9, 4])):
                out.append(wrapper.generate(x, 5, temperature=0.0, prompt_lens=lens))
        wrapper.max_seq_len = model.max_seq_len
        _, cache = model(x[:, :5], return_intermediates=True)
        out += [*keys_values(cache), model(x, cache=cache, cache_age=4)]
        model.requires_grad_(True)
        loss = wrapper(x)
        found.append([*out, loss.detach(), *gradients(model, loss)])

    assert_same_bits(*found)


# state dicts and whole models go both ways


@pytest.mark.parametrize("options", [SMALL, {**SMALL, **MEMORY}, OPTIONS])
def test_what_is_saved_of_one_loads_in_the_other(options: dict[str, Any]) -> None:
    x, (models, others) = tokens(7, 2, 33), (build_both(options, seed, torch.float32) for seed in (7, 8))
    assert_same_bits(*({**model.state_dict()} for model in models))
    assert [name for name, _ in models[0].named_buffers()] == [name for name, _ in models[1].named_buffers()]
    if IS_OLDER and options is OPTIONS:  # there is no answer of upstream's to compare with
        return
    imports: tuple[Callable[[], Any], ...] = (nullcontext, pristine_imports)  # pickle finds classes by name

    for model, saving in zip(models, imports):
        saved = io.BytesIO()
        with saving():
            torch.save(model, saved)
        for own, other, loading in zip(models, others, imports):
            other.load_state_dict(model.state_dict(), strict=True)
            saved.seek(0)
            with loading():
                loaded = torch.load(saved, weights_only=False)
            assert type(loaded) is type(own)
            # upstream takes its angles from buffers in float32 and from absolute positions, up to 33: each is off by
            # 33 half ulps, the scores by 2 ** 6 times that, and there are two layers
            is_rounded = options is OPTIONS and own is not model
            tolerance = 33 * 2**7 * torch.finfo(torch.float32).eps if is_rounded else 0
            for actual in (loaded(x), other(x)):
                assert (actual - model(x)).abs().max() <= tolerance * model(x).abs().max()
