"""examples/length_extrapolation.py: it shows what it says, and trains no model twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from trees import ROOT, output, pristine_tree

from examples import length_extrapolation as example

pytestmark = pytest.mark.slow


def test_table_and_figure_show_every_line_upstream_agrees_and_a_second_run_does_not_train(tmp_path: Path) -> None:
    def run() -> str:
        command = [sys.executable, ROOT / "examples" / "length_extrapolation.py", "--quick", f"--out={tmp_path}"]
        return output(*command, f"--upstream={pristine_tree()}")

    table = run()
    labels = [line.label for line in example.lines(("none", "rotary"))]
    rows = [row.split("|")[1:-1] for row in table.splitlines() if row.startswith("|")]
    assert {len(row) for row in rows} == {1 + len(example.FACTORS)}
    assert len(rows) == len(example.MODES) * (2 + len(labels))
    picture = (tmp_path / "length_extrapolation.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {label}" in picture for label in labels)

    # logits of both agree to some 1e-6, float32 rounding over two layers; the loss is an average of thousands
    bits = json.loads((tmp_path / "length_extrapolation.json").read_text(encoding="utf-8"))
    for mode in ("call", "window"):
        assert bits["xPos: fork"][mode] == pytest.approx(bits["xPos: upstream"][mode], abs=1e-5)
    # so do folded weights at the length trained at; upstream's memory keys count for more, the longer the window is
    folded = bits["xPos, mem_kv: upstream's weights, folded, in the fork"]["call"]
    unfolded = bits["xPos, mem_kv: upstream"]["call"]
    assert folded[0] == pytest.approx(unfolded[0], abs=1e-5)
    assert abs(unfolded[-1] - folded[-1]) > 1e-4

    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert run() == table
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")} == trained != {}
