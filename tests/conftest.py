"""The models of the tests are tiny: one thread is faster for them than several, and leaves room for other processes."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the programs that tests start
