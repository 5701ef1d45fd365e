"""The tests that Transformers runs on each of its models, run on UniMoE with all four towers."""

import unittest
from unittest.mock import patch

import torch
from common.loading import load
from common.skips import without_inapplicable_tests
from tiny_models import (
    num_placeholders,
    tiny_config,
    tiny_inputs,
    tiny_qformer_config,
    tiny_text_config,
    tiny_whisper_config,
)

from unimoe import UniMoEConfig, UniMoEForConditionalGeneration, UniMoEModel, UniMoEPreTrainedModel

common = load("test_modeling_common")

# Low ids, since some tests shrink the vocabulary.
PLACEHOLDERS = {"image_token_id": 3, "video_token_id": 4, "audio_token_id": 5, "speech_token_id": 6}
# By these names the tests know which labels a class takes.
MODEL_NAMES = (
    (common.MODEL_MAPPING_NAMES, "UniMoEModel"),
    (common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "UniMoEForConditionalGeneration"),
    (common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "UniMoEForConditionalGeneration"),
)


# For tests that load checkpoints without most of their tensors, which UniMoE refuses unless told otherwise.
lenient = patch.object(UniMoEPreTrainedModel, "strict_loading", False)


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
        # The tests go through the parameters one by one, many times; more layers would only take more time.
        qformer = {"type": "qformer", "backbone_config": tiny_qformer_config(num_hidden_layers=1)}
        decoder = {"type": "whisper_decoder", "backbone_config": tiny_whisper_config(decoder_layers=1)}
        return tiny_config(
            text_config=tiny_text_config(num_hidden_layers=2),
            speech_config=tiny_whisper_config(encoder_layers=1),
            audio_connector_config={**qformer, "num_query_tokens": 3},
            speech_connector_config={**decoder, "num_query_tokens": 5},
            **PLACEHOLDERS,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        return config, tiny_inputs(config, self.batch_size)


@without_inapplicable_tests
class UniMoEModelTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (UniMoEModel, UniMoEForConditionalGeneration)
    _is_composite = True
    # Which parameters must have one, `test_unused_parameters` says exactly.
    test_all_params_have_gradient = False

    @classmethod
    def setUpClass(cls):
        for names, class_name in MODEL_NAMES:
            patcher = patch.dict(names, {UniMoEConfig.model_type: class_name})
            patcher.start()
            cls.addClassCleanup(patcher.stop)

    def setUp(self):
        self.model_tester = UniMoEModelTester()

    def _audio_features_prepare_config_and_inputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {name: inputs[name] for name in ("input_values", "input_values_mask")}

    @lenient
    def test_correct_missing_keys(self):
        super().test_correct_missing_keys()

    @lenient
    def test_model_weights_reload_no_missing_tied_weights(self):
        super().test_model_weights_reload_no_missing_tied_weights()

    def test_moe_models_record_router_logits(self):
        # It takes a model for sparse whose own file has this text; ours is in the file of the experts.
        with patch.object(common.inspect, "getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()

    def test_output_router_logits_from_config(self):
        # It sets the flag of the decoder's configuration; ours is in the configuration of the whole.
        with patch.object(UniMoEConfig, "get_text_config", lambda self, **kwargs: self):
            super().test_output_router_logits_from_config()

    def test_unused_parameters(self):
        """Every parameter has a gradient but those of the vision tower behind the layer that is read."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = UniMoEForConditionalGeneration(config).train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
        behind = ("model.vision_tower.encoder.layers.1.", "model.vision_tower.post_layernorm.")
        self.assertEqual(without, {name for name, _ in model.named_parameters() if name.startswith(behind)})

    def test_get_speech_features(self):
        """What the common tests ask of images, videos and audio, asked of speech."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model = model_class(config).eval()
                model.set_attn_implementation("eager")
                with torch.no_grad():
                    outputs = model.get_speech_features(
                        inputs["input_features"], output_hidden_states=True, output_attentions=True
                    )
                    as_tuple = model.get_speech_features(inputs["input_features"], return_dict=False)
                speech = config.speech_config
                self.assertEqual(
                    outputs.last_hidden_state.shape,
                    (self.model_tester.batch_size, speech.max_source_positions, speech.d_model),
                )
                self.assertEqual(len(outputs.pooler_output), self.model_tester.batch_size)
                self.assertEqual(len(outputs.hidden_states), speech.encoder_layers + 1)
                self.assertEqual(len(outputs.attentions), speech.encoder_layers)
                self.assertIsInstance(as_tuple, tuple)
