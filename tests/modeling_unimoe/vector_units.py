"""Kinds of vector units that kernels can be compiled for on this machine, and what tests of kernels share."""

from types import ModuleType

import pytest

from unimoe.modeling_unimoe.llvm_kernels import VectorUnit, vector_unit

OWN = vector_unit()
# A processor runs code for narrower units than its own, too; with few registers, tiles are smaller.
UNITS = {"own": OWN}
if OWN is not None:
    UNITS["few registers"] = VectorUnit(min(8, OWN.width), 16, OWN.processor, OWN.features)
    UNITS["narrow"] = VectorUnit(4, 32, OWN.processor, OWN.features)

needs_kernels = pytest.mark.skipif(OWN is None, reason="no kernels are compiled on this processor")


def each_unit(module: ModuleType):
    """A fixture that compiles the kernels of a module for each kind of unit in turn."""

    @pytest.fixture(params=UNITS, name="unit")
    def unit(request, monkeypatch):
        monkeypatch.setattr(module, "vector_unit", lambda: UNITS[request.param])
        return UNITS[request.param]

    return unit
