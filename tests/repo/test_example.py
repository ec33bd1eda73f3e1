"""examples/length_extrapolation.py: it shows what it says, and goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from trees import ROOT, pristine_tree

from examples import length_extrapolation as command

SCRIPT = ROOT / "examples" / "length_extrapolation.py"

pytestmark = pytest.mark.slow
STEPS, NUM_MODES = 12, len(command.MODES)


def run(out: Path) -> str:
    """The table that it prints."""
    command = [sys.executable, str(SCRIPT), "--quick", f"--upstream={pristine_tree()}", f"--out={out}"]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where it has left its files, and the table."""
    out = tmp_path_factory.mktemp("out")
    return out, run(out)


def test_table_and_figure_show_every_line(ran: tuple[Path, str]) -> None:
    out, table = ran
    labels = [line.label for line in command.lines(("none", "rotary"))]
    rows = [row.split("|")[1:-1] for row in table.splitlines() if row.startswith("|")]
    assert {len(row) for row in rows} == {1 + len(command.FACTORS)}
    assert len(rows) == NUM_MODES * (2 + len(labels))
    picture = (out / "length_extrapolation.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {text}" in picture for text in labels)


def test_upstream_agrees_where_it_is_right_and_folded_weights_at_the_length_trained_at(ran: tuple[Path, str]) -> None:
    bits = json.loads((ran[0] / "length_extrapolation.json").read_text(encoding="utf-8"))
    # logits of both agree to some 1e-6, float32 rounding over two layers; the loss is an average of thousands
    for mode in ("call", "window"):
        assert bits["xPos: fork"][mode] == pytest.approx(bits["xPos: upstream"][mode], abs=1e-5)
    folded = bits["xPos, mem_kv: upstream's weights, folded, in the fork"]["call"]
    unfolded = bits["xPos, mem_kv: upstream"]["call"]
    assert folded[0] == pytest.approx(unfolded[0], abs=1e-5)
    # and upstream's memory keys count for something else, the longer the window is
    assert abs(unfolded[-1] - folded[-1]) > 1e-4


def test_a_second_run_repeats_the_table_without_training(ran: tuple[Path, str]) -> None:
    out, table = ran
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert run(out) == table
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.pt")} == before


# stopped and started again, in this process


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SAVE_EVERY", 5)
    monkeypatch.setattr(command, "MODES", command.MODES[:1])
    monkeypatch.setitem(command.QUICK, "steps", STEPS)
    monkeypatch.setitem(command.QUICK, "length", 8)


def main(out: Path, *arguments: str) -> dict[str, Any]:
    """What every checkpoint holds after a run."""
    command.main(["--quick", f"--data={SCRIPT}", f"--upstream={pristine_tree()}", f"--out={out}", *arguments])
    return {path.name: torch.load(path, weights_only=True) for path in sorted(out.glob("*.pt"))}


def assert_equal(actual: Any, expected: Any) -> None:
    """Two states are the same, bit for bit."""
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("stops", [{("step", 1)}, {("step", 7), ("save", 4)}, {("save", 1)}, {("step", STEPS + 6)}])
def test_stopped_anywhere_it_ends_with_the_same_weights(
    stops: set[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step of training, or with half of a checkpoint written."""
    expected = main(tmp_path / "uninterrupted")
    calls = dict(step=0, save=0)

    def stop(what: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        calls[what] += 1
        if (what, calls[what]) in stops:
            if what == "save":
                args[1].write_bytes(b"half of it")
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    step, save = torch.optim.AdamW.step, torch.save
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: stop("step", step, *args, **kwargs))
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: stop("save", save, *args, **kwargs))
    for _ in stops:
        torch.rand(3)  # the random state of the process that goes on is another
        with pytest.raises(KeyboardInterrupt):
            main(tmp_path / "stopped")
    assert_equal(main(tmp_path / "stopped"), expected)


def test_another_run_has_other_checkpoints_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    first = main(tmp_path)
    assert len(main(tmp_path, "--seed=1")) == 2 * len(first)
    path = tmp_path / next(iter(first))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=f"{path.name} is damaged"):
        main(tmp_path)
