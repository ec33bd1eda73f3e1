"""What the fork adds beside upstream's modules: a check that xPos is right on this machine, its limits, a conversion.

    python -m x_transformers.xpos

It works on an unpatched x_transformers too, and says what is wrong with it. Imports go down alone:

    __main__                        the command line
      report                        the package, and the outcome of its check, as text, JSON and a plot
        judge                       the verdict on every property of a model
          properties                what must hold, stated once for every model
            ours                    the check's own models, their text, and their attention observed
              subject               a model, its texts, the ways to run it, and how far its answers may be apart
                net                 one way to call a model, ours or the user's, and its twin with plain rotary
                  formula           the score of the paper, in float64
      theirs                        the user's model, built and searched for xPos      (subject)
      chunks                        a long sequence, taken in chunks through the KV cache        (net)
      limits                        how many queries fit into one call, and how scores fade        (formula)
      migrate                       a checkpoint of upstream's, converted and proven   (subject, theirs)
      provenance                    what the package was made from, and whether it is as it was built
"""

from __future__ import annotations

from .chunks import prefill
from .judge import Result, check
from .migrate import fold_mem_kv_
from .ours import Ours

__all__ = ["Ours", "Result", "check", "fold_mem_kv_", "prefill"]
