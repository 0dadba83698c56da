"""One thread: faster than several for the tiny models of the tests, and room for other processes."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for programs that tests start
