"""What the fork adds beside upstream's modules: a check that xPos is right on this machine.

    python -m x_transformers.xpos

runs small models with `rotary_xpos=True` over real text and compares what must be the same: see `properties`. The
same from Python:

    >>> import torch
    >>> from x_transformers.xpos import Subject, check
    >>> text = torch.randint(256, (256,))
    >>> subject = Subject(text, 256, device=torch.device("cpu"), dtype=torch.float32)
    >>> [result.name for result in check(subject) if not result.passed]   # doctest: +SKIP
    []

It works on an unpatched x_transformers too, and says what is wrong with it.
"""

from __future__ import annotations

from .migrate import fold_mem_kv_
from .properties import Result, check
from .subject import Point, Subject

__all__ = ["Point", "Result", "Subject", "check", "fold_mem_kv_"]
