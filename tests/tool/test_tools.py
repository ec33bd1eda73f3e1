"""The command `python -m x_transformers.xpos`, and what a user calls from Python beside `check`."""

from __future__ import annotations

import doctest
import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from commands import SHORT, Capture, Patch, process
from hypothesis import given
from hypothesis import strategies as st
from pristine import build_both
from strategies import OPTIONS, build, tokens
from trees import BACKPORT, ROOT, clean_environment, patched_tree, pristine_tree

from x_transformers import xpos
from x_transformers.xpos import __main__ as command
from x_transformers.xpos import check, checker, fold_mem_kv_, limits
from x_transformers.xpos.checker import properties
from x_transformers.xpos.limits import DTYPES

PROPERTIES = properties.ALL
with_memory_keys = partial(build, {**OPTIONS, "attn_num_mem_kv": 2}, 0, torch.float32)


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """The exit status of the command in this process, and what it prints on either output."""
    return (command.main(arguments), *capsys.readouterr())


# the check of the package itself


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", pytest.param("float64", marks=pytest.mark.slow)])
def test_every_property_holds(dtype: str, capsys: Capture) -> None:
    status, out, err = run(capsys, *SHORT, "--json", "--dtype", dtype)
    fields = json.loads(out)
    results = fields["results"]
    assert (status, fields["passed"], fields["run"]["dtype"]) == (0, True, dtype), results
    assert [result["key"] for result in results] == [prop.key for prop in PROPERTIES]
    for result in results:
        assert result["deviation"] == max(point["deviation"] for point in result["points"]) <= result["tolerance"]
    progress = [f"[{n}/{len(PROPERTIES)}] {prop.key}: {prop.compared}" for n, prop in enumerate(PROPERTIES, 1)]
    assert err.splitlines() == progress


def test_the_unpatched_release_is_told_from_the_fork(tmp_path: Path) -> None:
    result = process(tmp_path, *SHORT, path=pristine_tree())
    assert result.returncode == 1, result.stderr
    assert "UNPATCHED RotaryEmbedding.forward takes no seq_len" in result.stdout
    assert "the package is UNPATCHED: it is upstream's, not the fork" in result.stdout
    verdicts = {key: verdict for verdict, key in re.findall(r"^(pass|FAIL) .+?  (\S+): ", result.stdout, re.M)}
    assert {verdicts[key] for key in ("shift", "scores-cache", "range")} == {"FAIL"}
    assert (verdicts["prefix"], verdicts["scores"]) == ("pass", "pass")
    refused = process(tmp_path, "limits", path=pristine_tree())
    assert (refused.returncode, "install the fork" in refused.stderr) == (2, True)


def test_without_asserts_what_is_one_is_left_out(tmp_path: Path) -> None:
    found = process(tmp_path, *SHORT, python=("-O",))
    assert found.returncode == 0, found.stderr
    assert f"all {len(PROPERTIES) - 1} properties hold" in found.stdout
    assert "left out  refusals: these refusals are assert statements, which python -O removes" in found.stdout


@pytest.mark.parametrize("of", ["", "check", "limits"])
def test_help_has_examples_and_the_exit_status(of: str, capsys: Capture, monkeypatch: Patch) -> None:
    for name, value in (("COLUMNS", "40"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="0"):
        command.main([*of.split(), "--help"])
    plain = re.sub("\x1b.*?m", "", capsys.readouterr().out)
    assert re.search("^examples:\n  python -m x_transformers.xpos.*^exit status:.*130", plain, re.S | re.M)
    assert max(map(len, plain.splitlines())) <= 120


# what ends early


def test_an_interrupt_is_no_traceback(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(checker, "check_model", Mock(side_effect=KeyboardInterrupt))
    assert run(capsys, *SHORT) == (130, "", "\ninterrupted\n")


def test_in_a_checkout_that_is_not_installed_the_reason_is_one_line() -> None:
    # without site-packages, so that nothing is installed; the checkout has no x_transformers/__init__.py
    words = [sys.executable, "-S", "-m", "x_transformers.xpos", "limits"]
    found = subprocess.run(words, cwd=ROOT, env=clean_environment(), text=True, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1), found.stderr
    assert re.search("x_transformers is not installed in this environment.*Run `pip install .`", found.stderr)


@pytest.mark.parametrize("arguments", ["limits", "--help"])
def test_a_standard_output_that_is_closed_is_no_traceback(arguments: str) -> None:
    command = f"'{sys.executable}' -m x_transformers.xpos {arguments}"
    # buffered, so that what is left is written at exit
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    # in the first the reader is gone before anything is written
    for line in (f"({command}; echo $? >&2) | true", f"{command} >&-; echo $? >&2"):
        found = subprocess.run(["bash", "-c", line], env=environment, text=True, capture_output=True)
        assert found.stderr.endswith("0\n"), found.stderr
        assert not re.search("Traceback|Exception", found.stderr)


# models of a module

TRAIN = """
from torch import nn
from x_transformers import *
def net(rotary_xpos=True, **options):
    layers = Decoder(dim=32, depth=1, heads=2, rotary_xpos=rotary_xpos, **options)
    return TransformerWrapper(num_tokens=50, max_seq_len=40, attn_layers=layers)
def with_argument(size): return net()
not_a_function = 7
class Builder: build = staticmethod(net)
def build_model(): return {model}
"""
MODEL, NET, SPELLED = "--model train:build_model", "net()", "give MODULE:FACTORY, as train:build_model"


@pytest.fixture
def train(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The file of the module `train`, which is imported anew, as `python -m` would."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    return tmp_path / "train.py"


def test_check_of_a_function(train: Path, capsys: Capture) -> None:
    train.write_text(TRAIN.format(model=NET), encoding="utf-8")
    status, out, _ = run(capsys, "--model", "train:Builder.build", *SHORT)
    assert (status, "checked   TransformerWrapper of a Decoder" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "model", "said"),
    [
        ("no-such-command", NET, r"no-such-command.*check"),
        ("--max 128", NET, r"--max"),
        ("--dtype int8", NET, r"--dtype.*int8.*float16.*bfloat16"),
        ("--max-len 100000 --dtype float16", NET, r"max_len is 100000.*from 32 to 4532.*range of float16"),
        (f"{MODEL} --max-len 41", "net(disable_abs_pos_emb=False)", r"to 40, as its absolute position embedding"),
        ("--device no-such", NET, r"device = 'no-such'"),
        ("limits --scale-base nan", NET, r"scale_base is nan.*above 0"),
        ("--model train", NET, SPELLED),
        ("--model train.py:build_model", NET, SPELLED),
        ("--model models/train:build_model", NET, SPELLED),
        ("--model nowhere:build_model", NET, r"importing nowhere failed.*No module named 'nowhere'"),
        ("--model train:not_a_function", NET, r"'int' object is not callable"),
        ("--model train:with_argument", NET, r"without arguments.*'size'"),
        ("--model train:Builder.nothing", NET, r"has no attribute 'nothing'"),
        (MODEL, "{}['dim']", r"KeyError: 'dim' \(train\.py, line"),
        (MODEL, "__import__('sys').exit(3)", r"SystemExit: 3 \(train\.py, line"),
        (MODEL, "1\nraise SystemExit(1)", r"importing train failed: SystemExit: 1 \(train\.py, line"),
        (MODEL, "(:", r"SyntaxError.*train\.py, line"),
        (MODEL, "{}", r"the model is a dict.*TransformerWrapper"),
        (MODEL, "nn.Linear(2, 2)", r"Linear has no Decoder"),
        (MODEL, "net(False, rotary_xpos_scale_base=64)", r"without rotary_xpos = True.*_scale_base alone does nothing"),
        (MODEL, "net(rotary_xpos_scale_base=0.1)", r"of 32 for the check.* scale base of 0\.1"),
        (MODEL, "net(attn_l2_distance=True)", r"AssertionError.*attn_l2_distance.*train\.py, line"),
        (MODEL, "net().to('meta')", r"meta device"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    arguments: str, model: str, said: str, train: Path, capsys: Capture
) -> None:
    train.write_text(TRAIN.format(model=model), encoding="utf-8")
    status, out, message = run(capsys, *arguments.split())
    assert (status, out, message.count("\n")) == (2, "", 1), message
    assert re.search(said, message), message
    assert not re.search(r"site-packages|\(__init__\.py", message)


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
    assert ["float16", "9,065", "5,649", "12"] in rows
    # at a distance of the scale base, with the decay of the first pair, of all 16 and of the last
    mean = sum(2 * d / 32 + 0.4 for d in range(16)) / 16 / 1.4
    assert ["512", *(f"{left:.2g}" for left in (0.4 / 1.4, mean, (30 / 32 + 0.4) / 1.4))] in rows
    assert run(capsys, "limits", "--dim", "33")[0] == 0


# memory keys


def test_a_fold_that_is_refused_changes_nothing() -> None:
    model, folded = (with_memory_keys().half() for _ in range(2))
    # the first layer stays in the range, and changes: 1e-4 is of the pair that decays slowest, dims 4 and 5 of 6
    model.attn_layers.layers[0][1].mem_k.zero_()[..., 4] = 1e-4
    refused = {model: r"seq_len is 2000: .* the range of float16"}
    fold_mem_kv_(folded, 64)
    refused |= dict.fromkeys((folded, deepcopy(folded), folded.attn_layers), "folded before, for a seq_len of 64")
    for module, message in refused.items():
        before = deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=message):
            fold_mem_kv_(module, 2_000)
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    # a state dict has the keys of upstream's, so it does not tell
    model.load_state_dict(folded.state_dict())
    assert fold_mem_kv_(model, 64) == 2


def test_the_recipe_converts_a_checkpoint_of_upstreams(tmp_path: Path) -> None:
    """At the length of training the converted checkpoint answers as upstream's release does with the old one."""
    (model, upstreams), x = build_both({**OPTIONS, "attn_num_mem_kv": 2}, 0), tokens(0, 1, 40)
    old, new, recipe = tmp_path / "old.pt", tmp_path / "new.pt", dict[str, Any]()
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/migration.md").read_text("utf-8"), re.S | re.M)
    exec(block, recipe)
    torch.save(upstreams.state_dict(), old)
    recipe["convert"](model, old, new, 40)
    model.load_state_dict(torch.load(new, weights_only=True))
    torch.testing.assert_close(model(x), upstreams(x), atol=1e-9, rtol=0)


@pytest.mark.slow
def test_the_older_line_has_them_too(tmp_path: Path) -> None:
    code = """
from x_transformers import *
from x_transformers.xpos import *
layers, with_memory_keys = (Decoder(dim=32, depth=1, heads=2, rotary_xpos=True, attn_num_mem_kv=n) for n in (0, 3))
wrapper = TransformerWrapper(num_tokens=50, max_seq_len=256, max_mem_len=256, attn_layers=layers)
report = check(XLAutoregressiveWrapper(wrapper), max_len=32)
print(report.passed, len(report.results), [each.key for each in report.left_out])
print(limits().queries["float32"], fold_mem_kv_(with_memory_keys, 100))
"""
    found = process(tmp_path, python=("-c", code), path=patched_tree(BACKPORT))
    assert found.stdout == "True 7 ['cached-new', 'shift']\n72521 1\n", found.stderr


# all of the library


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
    words = [
        "Args:",
        "Returns:",
        "Raises:",
        "Example:",
        *(f"{each}: " for each in inspect.signature(function).parameters),
    ]
    assert [word for word in words if word not in str(inspect.getdoc(function))] == []


REFUSED: dict[Callable[..., object], list[dict[str, Any]]] = {
    check: [dict(dtype=torch.int8), dict(dtype="float16"), dict(max_len=31), dict(max_len=40.5)],
    fold_mem_kv_: [dict(seq_len=2.5)],
    limits: [dict(dim=2), dict(dim=2.5), dict(scale_base=0), dict(scale_base=-1), dict(length=0), dict(length=1.5)],
}


@pytest.mark.parametrize(("call", "arguments"), [(call, each) for call in REFUSED for each in REFUSED[call]])
def test_arguments_that_cannot_be_used(call: Callable[..., object], arguments: dict[str, Any]) -> None:
    model = () if call is limits else (with_memory_keys(),)
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} is {value}: give {'torch.float16' * (name == 'dtype')}"):
        call(*model, **arguments)
