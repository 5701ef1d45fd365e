"""Leaves the common tests out where their source cannot be had; `test_source_distribution.py` then says so, once."""

from collections.abc import Generator

import pytest
from common import loading
from common.skips import reason_to_skip

# Marks that the tests carry, which pytest is to know.
MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_pipeline_test",
    "order",
    "slow",
    "torch_compile_test",
)

collect_ignore = ["stand_ins"]
try:
    loading.fetch()
except loading.CommonTestsUnavailable:
    collect_ignore_glob = ["test_*_common_unimoe.py"]


def pytest_configure(config: pytest.Config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by Transformers on its common tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator:
    """Fails a common test that is skipped without an entry in the tables of `skips.py`."""
    report = yield
    test_class = getattr(item, "cls", None)
    if report.skipped and test_class is not None and reason_to_skip(test_class.__name__, item.name) is None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but skips.py does not list it: {report.longrepr}"
    return report
