from __future__ import annotations

import pytest
from commands import Tool


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(capsys)
