"""The tests that Transformers runs on each of its processors, run on UniMoE's."""

import unittest

import numpy as np
from common.loading import load
from processing.tiny_processor import NUM_TOKENS, sound, tiny_processor

from unimoe import UniMoEProcessor

common = load("test_processing_common")
SAMPLING_RATE = 16000


class UniMoEProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = UniMoEProcessor
    audio_input_name = "input_values"

    @classmethod
    def _setup_component(cls, attribute):
        return getattr(tiny_processor(), attribute)

    @staticmethod
    def prepare_processor_dict():
        return {f"num_{kind}_tokens": count for kind, count in NUM_TOKENS.items()}

    def prepare_audio_inputs(self, batch_size: int | None = None) -> list[tuple[np.ndarray, int]]:
        # An array without its sampling rate is refused.
        return [(sound(1000), SAMPLING_RATE)] * (batch_size or 1)
