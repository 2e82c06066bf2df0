"""What a federation over a network costs: `python -m bench network`, on loopback.

It stands on the harness of tests/flower: the same SuperLink, SuperNodes and command line.
"""

import sys

from bench.results import ROOT

# The modules of the harness, which are no package; pytest has them on its path already.
HARNESS = [str(ROOT / "tests" / name) for name in ("flower", "fedspa")]
sys.path += [folder for folder in HARNESS if folder not in sys.path]
