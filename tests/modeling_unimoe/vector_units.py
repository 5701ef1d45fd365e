"""Kinds of vector units that kernels can be compiled for on this machine."""

from unimoe.modeling_unimoe.llvm_kernels import VectorUnit, vector_unit

OWN = vector_unit()
# A processor runs code for narrower units than its own, too; with few registers, tiles are smaller.
UNITS = {"own": OWN}
if OWN is not None:
    UNITS["few registers"] = VectorUnit(min(8, OWN.width), 16, OWN.processor, OWN.features)
    UNITS["narrow"] = VectorUnit(4, 32, OWN.processor, OWN.features)
