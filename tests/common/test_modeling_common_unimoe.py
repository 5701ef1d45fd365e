"""The tests that Transformers runs on each of its models, run on UniMoE with all four towers."""

import unittest
from unittest.mock import patch

from common.loading import load
from tiny_models import num_placeholders, tiny_config, tiny_inputs, tiny_text_config

from unimoe import UniMoEConfig, UniMoEForConditionalGeneration, UniMoEModel

common = load("test_modeling_common")

# Low ids, since some tests shrink the vocabulary.
PLACEHOLDERS = {"image_token_id": 3, "video_token_id": 4, "audio_token_id": 5, "speech_token_id": 6}
# By these names the tests know which labels a class takes.
MODEL_NAMES = (
    (common.MODEL_MAPPING_NAMES, "UniMoEModel"),
    (common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "UniMoEForConditionalGeneration"),
    (common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "UniMoEForConditionalGeneration"),
)


class UniMoEModelTester:
    """Gives the tests a configuration and inputs; they read its attributes."""

    batch_size = 3
    is_training = True

    def __init__(self):
        config = self.get_config()
        text = config.text_config
        self.text_config = text.to_dict()
        self.vision_config = config.vision_config.to_dict()
        self.audio_config = config.audio_config.to_dict()
        self.vocab_size = text.vocab_size
        self.hidden_size = text.hidden_size
        self.num_hidden_layers = text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads
        self.seq_length = tiny_inputs(config)["input_ids"].shape[1]
        self.image_length = num_placeholders(config, "image")

    def get_config(self) -> UniMoEConfig:
        return tiny_config(text_config=tiny_text_config(num_hidden_layers=2), **PLACEHOLDERS)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        return config, tiny_inputs(config, self.batch_size)


class UniMoEModelTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (UniMoEModel, UniMoEForConditionalGeneration)
    _is_composite = True

    @classmethod
    def setUpClass(cls):
        for names, class_name in MODEL_NAMES:
            patcher = patch.dict(names, {UniMoEConfig.model_type: class_name})
            patcher.start()
            cls.addClassCleanup(patcher.stop)

    def setUp(self):
        self.model_tester = UniMoEModelTester()
