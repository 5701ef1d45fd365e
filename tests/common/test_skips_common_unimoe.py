"""That the tables of skipped tests hold nothing that is out of date."""

import importlib
import unittest
from fnmatch import fnmatchcase

import pytest
from common import skips

MODULES = {
    skips.MODEL: "test_modeling_common_unimoe",
    skips.PROCESSOR: "test_processing_common_unimoe",
    skips.PIPELINE: "test_pipeline_common_unimoe",
}


@pytest.mark.parametrize("class_name", MODULES)
def test_every_entry_is_of_use(class_name):
    test_class = getattr(importlib.import_module(f"common.{MODULES[class_name]}"), class_name)
    names = unittest.defaultTestLoader.getTestCaseNames(test_class)
    for tables in (skips.DOES_NOT_APPLY, skips.NEEDS_MORE):
        for pattern in tables.get(class_name, {}):
            assert any(fnmatchcase(name, pattern) for name in names), f"{class_name} has no test {pattern}"
