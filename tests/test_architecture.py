"""Activated parameters of official sizes against the table of the MoE-LLaVA paper (table 1: 2.0B, 2.2B, 3.6B)."""

import pytest

from unimoe.architecture import count_parameters
from unimoe.modeling_unimoe.configuration_unimoe import UniMoEConfig

STABLELM = {
    "model_type": "stablelm",
    "vocab_size": 100352,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "use_qkv_bias": True,
}
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "first_generation": {"seq_length": 8192, "use_dynamic_ntk": True, "use_logn_attn": True},
}
PHI = {
    "model_type": "phi",
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize(
    "decoder, billions", [(STABLELM, 2.0), (QWEN, 2.2), (PHI, 3.6)], ids=["stablelm", "qwen", "phi"]
)
def test_activated_parameters_of_the_decoder(decoder, billions):
    config = UniMoEConfig(text_config=decoder, text_sparsity={"layers": "even", "num_experts": 4, "top_k": 2})
    # The table cuts off what follows the first decimal.
    activated = count_parameters(config)["language_model"].activated
    assert activated // 10**8 / 10 == billions
