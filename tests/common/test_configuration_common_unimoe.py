"""The tests that Transformers runs on each of its configurations, run on UniMoE's."""

import json
import unittest

from common.loading import load
from tiny_models import tiny_config

from unimoe import UniMoEAudioConfig, UniMoEConfig, UniMoEConnectorConfig, UniMoESparsityConfig

ConfigTester = load("test_configuration_common").ConfigTester
TOWERS = ("vision", "audio", "speech")
SUFFIXES = ("_config", "_connector_config")


class _ModelTester:
    """Where the tests look for a configuration that is not the default one."""

    get_config = staticmethod(tiny_config)


class UniMoEConfigTest(unittest.TestCase):
    model_tester = _ModelTester()

    def test_model(self):
        ConfigTester(self, config_class=UniMoEConfig, has_text_modality=False).run_common_tests()

    def test_towers(self):
        # One at a time: the tests find a sub-config in a folder by its type, and all connectors are of one type.
        for tower in TOWERS:
            absent = {f"{other}{suffix}": None for other in TOWERS if other != tower for suffix in SUFFIXES}
            # As a saved config.json holds them.
            arguments = json.loads(tiny_config(**absent).to_json_string())
            for name in ("transformers_version", "model_type", "auto_map", "custom_pipelines"):
                arguments.pop(name)
            with self.subTest(tower):
                tester = ConfigTester(self, config_class=UniMoEConfig, has_text_modality=False, **arguments)
                tester.run_common_tests()

    def test_audio(self):
        ConfigTester(self, config_class=UniMoEAudioConfig, has_text_modality=False, hidden_size=48).run_common_tests()

    def test_connector(self):
        for connector_type in ("linear", "mlp", "qformer", "whisper_decoder"):
            with self.subTest(connector_type):
                tester = ConfigTester(
                    self, config_class=UniMoEConnectorConfig, has_text_modality=False, type=connector_type
                )
                tester.run_common_tests()

    def test_sparsity(self):
        tester = ConfigTester(
            self,
            config_class=UniMoESparsityConfig,
            has_text_modality=False,
            common_properties=["layers", "num_experts", "top_k"],
            num_experts=8,
        )
        tester.run_common_tests()
