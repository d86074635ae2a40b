"""How tests compile, and what of their bounds depends on it.

LLVM's optimiser takes nearly half of the suite's time, for programs that run for milliseconds, so it is off; XLA's own passes
all run. `LOAM_TEST_OPTIMISED=1`, which `make test-slow` sets, compiles as users do.
"""

import os

OPTIMISED = bool(os.environ.get("LOAM_TEST_OPTIMISED"))
# Without it products are rounded before they are added.
ROUNDING = 1 if OPTIMISED else 2
