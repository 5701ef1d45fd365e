"""Leaves the common tests out where their source cannot be had; `test_source_distribution.py` then says so, once."""

from common import loading

collect_ignore = ["stand_ins"]
try:
    loading.fetch()
except loading.CommonTestsUnavailable:
    collect_ignore_glob = ["test_*_common_unimoe.py"]
