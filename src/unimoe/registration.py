"""Makes Transformers' Auto classes and `pipeline` know UniMoE. Runs once, when the package is imported."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .modeling_unimoe.configuration_unimoe import UniMoEConfig
from .modeling_unimoe.modeling_unimoe import UniMoEForConditionalGeneration, UniMoEModel
from .processing.feature_extraction_unimoe import UniMoEFeatureExtractor
from .processing.pipeline_unimoe import register_task
from .processing.processing_unimoe import UniMoEProcessor


def register() -> None:
    """Registers configuration, models, processor and the task `any-to-text`; calling it again changes nothing."""
    AutoConfig.register(UniMoEConfig.model_type, UniMoEConfig, exist_ok=True)
    AutoModel.register(UniMoEConfig, UniMoEModel, exist_ok=True)
    for auto_class in (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM):
        auto_class.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
    AutoFeatureExtractor.register(UniMoEConfig, UniMoEFeatureExtractor, exist_ok=True)
    AutoProcessor.register(UniMoEConfig, UniMoEProcessor, exist_ok=True)
    register_task()
    # From here on `save_pretrained` puts the code beside the weights, for machines without this package.
    UniMoEConfig.register_for_auto_class()
    UniMoEModel.register_for_auto_class("AutoModel")
    UniMoEForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
    UniMoEFeatureExtractor.register_for_auto_class()
    UniMoEProcessor.register_for_auto_class()
