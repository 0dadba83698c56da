"""Tests run in one thread, which is faster for tiny models. They make bases and worlds once."""

import functools
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for programs that tests start
collect_ignore = ["test_exercises.py"]  # runs only if it is named


@pytest.fixture(scope="session", autouse=True)
def bases(tmp_path_factory):
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "BASES", tmp_path_factory.mktemp("bases"))
        patch.setattr(train.data, "toy_world", functools.cache(train.data.toy_world))
        yield
