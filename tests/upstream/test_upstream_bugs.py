"""What docs/upstream-bugs.md says of the unpatched release is so, until upstream mends it."""

from __future__ import annotations

import re

import pytest
from pristine import pristine_imports
from trees import ROOT

PAGE = (ROOT / "docs" / "upstream-bugs.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_prints_what_is_said(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = re.findall(r"# prints (.*), should print", block)
    expected = [float(number) for numbers in said for number in numbers.split(" and ")]
    with pristine_imports():
        exec(block, {})
    assert expected
    # the page has two digits
    assert [float(number) for number in capsys.readouterr().out.split()] == pytest.approx(expected, rel=0.05)
