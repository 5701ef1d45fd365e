"""Sparse mixture-of-experts multimodal LLMs for Transformers. Importing this package registers its classes."""

from pathlib import Path

from .modeling_unimoe.configuration_unimoe import (
    UniMoEAudioConfig,
    UniMoEConfig,
    UniMoEConnectorConfig,
    UniMoESparsityConfig,
)
from .modeling_unimoe.modeling_unimoe import UniMoEForConditionalGeneration, UniMoEModel, UniMoEPreTrainedModel
from .modeling_unimoe.router import UniMoETopKRouter, fused_topk_router
from .modeling_unimoe.sparse_moe import UniMoESparseMoeBlock
from .modeling_unimoe.sparsify import load_sparsified, sparsify
from .processing.feature_extraction_unimoe import UniMoEFeatureExtractor
from .processing.media import MediaError
from .processing.pipeline_unimoe import AnyToTextPipeline
from .processing.processing_unimoe import UniMoEProcessor
from .registration import register
from .routing import record_routing
from .upcycling import upcycle

__version__ = "0.1.0"

register()


def tiny_checkpoint() -> str:
    """The folder of the embedded, trained checkpoint: all three towers, four experts, top-2; no network needed."""
    return str(Path(__file__).parent / "assets" / "unimoe-tiny")


__all__ = [
    "AnyToTextPipeline",
    "MediaError",
    "UniMoEAudioConfig",
    "UniMoEConfig",
    "UniMoEConnectorConfig",
    "UniMoEFeatureExtractor",
    "UniMoEForConditionalGeneration",
    "UniMoEModel",
    "UniMoEPreTrainedModel",
    "UniMoEProcessor",
    "UniMoESparseMoeBlock",
    "UniMoESparsityConfig",
    "UniMoETopKRouter",
    "fused_topk_router",
    "load_sparsified",
    "record_routing",
    "register",
    "sparsify",
    "tiny_checkpoint",
    "upcycle",
]
