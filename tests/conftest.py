"""Settings and fixtures that every test shares."""

import os
from collections.abc import Callable, Generator
from pathlib import Path

# Set before the first import of Transformers: no test may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
from golden_sets import FOLDERS, find_set, left_out  # noqa: E402


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """A function from a set's name ("unimoe_audio") to its folder; skips the test where no copy of the set exists."""

    def find(name: str) -> Path:
        folder = find_set(name)
        if folder is None:
            pytest.skip(f"golden set {name} is in none of: {', '.join(map(str, FOLDERS))}")
        return folder

    return find


def _skip_what_the_subset_lacks() -> Generator:
    try:
        return (yield)
    except Exception as error:
        name = left_out(error)
        if name is None:
            raise
        pytest.skip(f"{name} is not in the small subset of the golden sets")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator:
    return (yield from _skip_what_the_subset_lacks())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator:
    return (yield from _skip_what_the_subset_lacks())
