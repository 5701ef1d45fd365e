"""The tests that Transformers runs with each of its models in each pipeline, run on UniMoE."""

import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from common.loading import load
from common.skips import without_inapplicable_tests
from processing.tiny_processor import tiny_config_for, tiny_processor
from transformers import LlamaTokenizer

from unimoe import UniMoEConfig, UniMoEFeatureExtractor, UniMoEForConditionalGeneration, UniMoEModel, UniMoEProcessor

common = load("test_pipeline_mixin")

MODELS = (UniMoEModel, UniMoEForConditionalGeneration)
CASES = {
    "any-to-text": "AnyToTextPipelineTests",
    "feature-extraction": "FeatureExtractionPipelineTests",
    "image-text-to-text": "ImageTextToTextPipelineTests",
    "text-generation": "TextGenerationPipelineTests",
}
# Transformers keeps these beside its tiny models on the hub.
SUMMARY = {
    "tokenizer_classes": [LlamaTokenizer.__name__],
    "processor_classes": [UniMoEFeatureExtractor.__name__],
}


@without_inapplicable_tests
class UniMoEPipelineTest(common.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {
        "any-to-text": UniMoEForConditionalGeneration,
        "feature-extraction": UniMoEModel,
        "image-text-to-text": UniMoEForConditionalGeneration,
        "text-generation": UniMoEForConditionalGeneration,
    }

    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        folder = Path(temporary.name)
        processor = tiny_processor()
        for model_class in MODELS:
            torch.manual_seed(0)
            model = model_class(tiny_config_for(processor))
            model.save_pretrained(folder / "unimoe" / model_class.__name__)
            processor.save_pretrained(folder / "unimoe" / model_class.__name__)
        known = {kind.__name__: kind for kind in (LlamaTokenizer, UniMoEFeatureExtractor, UniMoEProcessor)}
        tests = {task: {"test": f"common.pipeline_cases.{name}"} for task, name in CASES.items()}
        for name, value in (
            ("TRANSFORMERS_TINY_MODEL_PATH", str(folder)),
            ("tiny_model_summary", {model_class.__name__: SUMMARY for model_class in MODELS}),
            ("transformers_module", SimpleNamespace(**known)),
            ("PROCESSOR_MAPPING_NAMES", {UniMoEConfig.model_type: UniMoEProcessor.__name__}),
            ("pipeline_test_mapping", {**common.pipeline_test_mapping, **tests}),
        ):
            patcher = patch.object(common, name, value)
            patcher.start()
            cls.addClassCleanup(patcher.stop)

    def test_pipeline_any_to_text(self):
        self.run_task_tests(task="any-to-text")

    def test_pipeline_any_to_text_fp16(self):
        self.run_task_tests(task="any-to-text", dtype="float16")
