"""Tests run in one thread, which is faster for tiny models and leaves room for others."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for programs that tests start
