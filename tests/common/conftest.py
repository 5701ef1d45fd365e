"""Leaves the common tests out where their source cannot be had; `test_source_distribution.py` then says so, once."""

import pytest
from common import loading

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
