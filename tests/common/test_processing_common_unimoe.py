"""The tests that Transformers runs on each of its processors, run on UniMoE's."""

import unittest
from typing import Any
from unittest.mock import patch

import numpy as np
from common.loading import load
from common.skips import without_inapplicable_tests
from processing.tiny_processor import NUM_TOKENS, frames, sound, tiny_processor

from unimoe import UniMoEFeatureExtractor, UniMoEProcessor

common = load("test_processing_common")
SAMPLING_RATE = 16000


@without_inapplicable_tests
class UniMoEProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = UniMoEProcessor
    audio_input_name = "input_values"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # An array without its sampling rate is refused.
        patcher = patch.dict(common.MODALITY_TEST_SPECS["audio"]["call_time_kwargs"], {"sampling_rate": SAMPLING_RATE})
        patcher.start()
        cls.addClassCleanup(patcher.stop)

    @classmethod
    def _setup_component(cls, attribute: str) -> Any:
        if attribute == "feature_extractor":
            # The tests expect one chunk of a second of sound.
            return UniMoEFeatureExtractor(audio_chunk_samples=2 * SAMPLING_RATE)
        return getattr(tiny_processor(), attribute)

    @staticmethod
    def prepare_processor_dict() -> dict[str, int]:
        return {f"num_{kind}_tokens": count for kind, count in NUM_TOKENS.items()}

    def prepare_audio_inputs(self, batch_size: int | None = None) -> list[tuple[np.ndarray, int]]:
        # For calls that pass no sampling rate.
        return [(sound(1000), SAMPLING_RATE)] * (batch_size or 1)

    def _prepare_modality_input(self, modality: str, batch_size: int | None = None) -> Any:
        # For calls that do, among them those of the feature extractor.
        if modality == "audio":
            return [sound(1000)] * (batch_size or 1)
        return super()._prepare_modality_input(modality, batch_size)

    def test_processor_with_multiple_inputs(self):
        # Its text has a video, which it passes only to processors with a `video_processor`.
        self.video_token = ""
        super().test_processor_with_multiple_inputs()

    def test_model_input_names_of_all_media(self):
        processor = self.get_processor()
        inputs = processor(
            text="<image> <video> <video> <audio> <speech>",
            images=self.prepare_images_inputs(),
            videos=[frames(2), frames(3)],
            audio=self.prepare_audio_inputs(),
            speech=self.prepare_audio_inputs(),
            return_tensors="pt",
        )
        self.assertSetEqual(set(inputs), set(processor.model_input_names))
