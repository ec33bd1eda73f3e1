"""What a user calls from Python beside `check`: limits and folding; what all four refuse, and their documentation."""

from __future__ import annotations

import doctest
import inspect
import math
import re
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Capture, process, run
from hypothesis import given
from hypothesis import strategies as st
from pristine import build_both
from strategies import OPTIONS, build, tokens
from trees import BACKPORT, ROOT, patched_tree

from x_transformers import xpos
from x_transformers.xpos import check, fold_mem_kv_, limits
from x_transformers.xpos.limits import DTYPES

with_memory_keys = partial(build, {**OPTIONS, "attn_num_mem_kv": 2}, 0, torch.float32)


def test_the_public_names_are_four_and_import_nothing_of_the_checker(tmp_path: Path) -> None:
    assert sorted(xpos.__all__) == ["check", "fold_mem_kv_", "limits", "prefill"]
    code = "import sys; from x_transformers.xpos import *; limits(); print(prefill, [*sys.modules])"
    found = process(tmp_path, python=("-c", code))
    assert "x_transformers.xpos.memory_keys" in found.stdout, found.stderr
    assert "xpos.checker" not in found.stdout


@pytest.mark.parametrize("name", xpos.__all__)
def test_examples_of_the_docstrings_run(name: str) -> None:
    function = getattr(xpos, name)
    (example,) = doctest.DocTestFinder().find(function, name, globs={name: function})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example).attempted >= 2
    assert runner.failures == 0
    documented = inspect.getdoc(function) or ""
    expected = [f"{each}: " for each in inspect.signature(function).parameters]
    expected += ["Args:", "Returns:", "Raises:", "Example:"]
    assert [word for word in expected if word not in documented] == []


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (check, dict(dtype=torch.int8), "dtype is torch.int8"),
        (check, dict(dtype="float16"), "dtype is float16: give torch.float16"),
        (check, dict(max_len=31), "max_len is 31: give a whole number from 32 to "),
        (check, dict(max_len=40.5), "max_len is 40.5: give a whole number from 32"),
        (fold_mem_kv_, dict(seq_len=2.5), "seq_len is 2.5"),
        (limits, dict(dim=2), "dim is 2"),
        (limits, dict(dim=2.5), "dim is 2.5"),
        (limits, dict(scale_base=0), "scale_base is 0"),
        (limits, dict(scale_base=-1), "scale_base is -1"),
        (limits, dict(length=0), "length is 0"),
        (limits, dict(length=1.5), "length is 1.5"),
    ],
)
def test_arguments_that_cannot_be_used(call: Callable[..., object], arguments: dict[str, Any], message: str) -> None:
    model = () if call is limits else (with_memory_keys(),)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*model, **arguments)


# limits


@given(st.integers(1, 10**6), st.floats(0.5, 10_000), st.sampled_from([*DTYPES]))
def test_limits_are_those_of_the_range_of_the_dtype(length: int, scale_base: float, name: str) -> None:
    def most(scale_base: float) -> int:
        largest = torch.finfo(DTYPES[name]).max
        return 2 * math.floor(scale_base * math.log(largest) / math.log(1.4 / 0.4)) + 1

    found = limits(scale_base, length)
    assert found.scale_bases is not None
    assert found.calls is not None
    assert found.queries[name] == most(scale_base)
    base = found.scale_bases[name]
    assert most(base - 1) < length <= most(base) or base == 1
    assert (found.calls[name] - 1) * found.queries[name] < length <= found.calls[name] * found.queries[name]


def test_the_table_of_limits(capsys: Capture) -> None:
    status, out, err = run(capsys, "limits", "--length", "100000")
    assert (status, out, err) == (0, f"{limits(length=100_000)}\n", "")
    assert max(map(len, out.splitlines())) <= 105
    rows = [line.split() for line in out.splitlines()]
    # those that the documents name
    assert ["float16", "9,065", "5,649", "12"] in rows
    assert {("bfloat16", "72,519"), ("float32", "72,521")} <= {tuple(row[:2]) for row in rows}
    # at a distance of the scale base, with the decay of the first pair, of all 16 and of the last
    mean = sum(2 * d / 32 + 0.4 for d in range(16)) / 16 / 1.4
    assert ["512", *(f"{left:.2g}" for left in (0.4 / 1.4, mean, (30 / 32 + 0.4) / 1.4))] in rows
    assert run(capsys, "limits", "--dim", "33")[0] == 0


# memory keys


def test_a_second_fold_is_refused() -> None:
    model = with_memory_keys()
    fold_mem_kv_(model, 64)
    folded = deepcopy(model.state_dict())
    for again in (model, deepcopy(model), model.attn_layers):
        with pytest.raises(ValueError, match="folded before, for a seq_len of 64"):
            fold_mem_kv_(again, 64)
    assert all(torch.equal(value, folded[name]) for name, value in model.state_dict().items())
    # a state dict has the keys of upstream's, so it does not tell
    loaded = with_memory_keys()
    loaded.load_state_dict(folded)
    assert fold_mem_kv_(loaded, 64) == 2


def test_a_fold_that_leaves_the_range_changes_nothing() -> None:
    model = with_memory_keys().half()
    # the first layer stays in the range, and changes: 1e-4 is of the pair that decays slowest, dims 4 and 5 of 6
    model.attn_layers.layers[0][1].mem_k.zero_()[..., 4] = 1e-4
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"seq_len is 2000: .* the range of float16"):
        fold_mem_kv_(model, 2_000)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_the_recipe_converts_a_checkpoint_of_upstreams(tmp_path: Path) -> None:
    """At the length of training the converted checkpoint answers as upstream's release does with the old one."""
    model, upstreams = build_both({**OPTIONS, "attn_num_mem_kv": 2}, 0, torch.float64)
    old, new, x = tmp_path / "old.pt", tmp_path / "new.pt", tokens(0, 1, 40)
    torch.save(upstreams.state_dict(), old)
    recipe: dict[str, Any] = {}
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/migration.md").read_text("utf-8"), re.S | re.M)
    exec(block, recipe)
    unconverted = model(x)
    recipe["convert"](model, old, new, 40)
    model.load_state_dict(torch.load(new, weights_only=True))
    expected = upstreams(x)
    torch.testing.assert_close(model(x), expected, atol=1e-9, rtol=0)
    assert not torch.allclose(unconverted, expected, atol=1e-3)


@pytest.mark.slow
def test_the_older_line_has_them_too(tmp_path: Path) -> None:
    code = """
from x_transformers import *
from x_transformers.xpos import *
def net(**options): return Decoder(dim=32, depth=1, heads=2, rotary_xpos=True, **options)
wrapper = TransformerWrapper(num_tokens=50, max_seq_len=256, max_mem_len=256, attn_layers=net())
report = check(XLAutoregressiveWrapper(wrapper), max_len=32)
print(report.passed, len(report.results), [each.key for each in report.left_out])
print(limits().queries["float32"], fold_mem_kv_(net(attn_num_mem_kv=3), 100))
"""
    found = process(tmp_path, python=("-c", code), path=patched_tree(BACKPORT))
    assert found.stdout == "True 6 ['cached-new', 'shift']\n72521 1\n", found.stderr
