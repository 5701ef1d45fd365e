"""Connectors against recorded outputs of the originals, and inside a Transformers model."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from unimoe.modeling_unimoe.configuration_unimoe import UniMoEConnectorConfig
from unimoe.modeling_unimoe.connectors import build_connector, init_connector_weights
from unimoe.modeling_unimoe.sparse_moe import init_sparse_moe_weights

INPUT_SIZE, OUTPUT_SIZE = 32, 24
QFORMER = {
    "hidden_size": 40,
    "encoder_hidden_size": INPUT_SIZE,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
WHISPER = {
    "d_model": INPUT_SIZE,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_target_positions": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "linear": {"type": "linear"},
    "mlp2": {"type": "mlp"},
    "mlp3": {"type": "mlp", "num_layers": 3, "hidden_size": 20},
    "sparse": {"type": "mlp", "sparsity": {"num_experts": 4, "top_k": 2}},
    "qformer": {"type": "qformer", "num_query_tokens": 5, "backbone_config": QFORMER},
    "qformer_mlp": {"type": "qformer", "num_query_tokens": 5, "backbone_config": QFORMER, "projector_num_layers": 2},
    "whisper_decoder": {"type": "whisper_decoder", "num_query_tokens": 5, "backbone_config": WHISPER},
}
QUERY_TYPES = [name for name in CONFIGS if "qformer" in name or "whisper" in name]


class Host(PreTrainedModel):
    """The least model around a connector, with the hooks that the real one has."""

    config_class = UniMoEConnectorConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.connector = build_connector(config, INPUT_SIZE, OUTPUT_SIZE)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        init_connector_weights(module, self.config.initializer_range)
        init_sparse_moe_weights(module, self.config.initializer_range)

    def forward(self, features):
        return self.connector(features)


@pytest.fixture(params=CONFIGS)
def host(request):
    torch.manual_seed(0)
    return Host(UniMoEConnectorConfig(**copy.deepcopy(CONFIGS[request.param]), initializer_range=0.2)).eval()


@pytest.fixture
def features():
    return torch.randn(3, 11, INPUT_SIZE, generator=torch.Generator().manual_seed(1))


def attention_configs(host):
    return [module.config for module in host.modules() if isinstance(module, PreTrainedModel) and module is not host]


def load_tensors(path, *parts):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys() if any(part in name for part in parts)}


# --- against the originals


@pytest.fixture(scope="module")
def audio_aligner(golden):
    weights = torch.load(
        golden("unimoe_audio") / "checkpoint" / "Uni-MoE-audio-e2" / "mm_audio_aligner.bin", weights_only=True
    )
    weights = {
        name.removeprefix("model.mm_audio_aligner.")
        .replace("qformer.qformer.", "qformer.")
        .replace("projector.", "projector.layers.0."): value
        for name, value in weights.items()
    }
    config = UniMoEConnectorConfig(
        type="qformer",
        num_query_tokens=10,
        backbone_config={
            "hidden_size": 48,
            "encoder_hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 96,
        },
    )
    connector = build_connector(config, 48, 64)
    connector.load_state_dict(weights)
    return connector.eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_audio_aligner_matches_the_original(audio_aligner, golden, implementation):
    audio_aligner.qformer.set_attn_implementation(implementation)
    tensors = load_tensors(golden("unimoe_audio") / "cases.safetensors", "component_aligner.", "audio.")
    for inputs, states, embeddings in (
        ("component_aligner.input", "component_aligner.qformer_output", "component_aligner.output"),
        ("audio.beats_features.0", "audio.qformer_output.0", "audio.audio_aligner_output.0"),
    ):
        features = tensors[inputs]
        queries = audio_aligner.query_tokens.expand(len(features), -1, -1)
        torch.testing.assert_close(audio_aligner.read(queries, features), tensors[states], atol=3e-5, rtol=0)
        torch.testing.assert_close(audio_aligner(features), tensors[embeddings], atol=3e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpoint, cases", [("Uni-MoE-speech-e2", "e2"), ("Uni-MoE-speech-v1.5", "v1.5")])
@torch.no_grad()
def test_speech_aligner_matches_the_original(golden, checkpoint, cases, implementation):
    folder = golden("unimoe_speech")
    weights = torch.load(folder / "checkpoint" / checkpoint / "mm_audio_aligner.bin", weights_only=True)
    weights = {
        name.removeprefix("model.")
        .removeprefix("mm_audio_aligner.")
        .replace("decoder.audio_decoder.", "decoder.")
        .replace("projector.", "projector.layers.0."): value.float()
        for name, value in weights.items()
        if "embed_tokens" not in name
    }
    whisper = json.loads((folder / "checkpoint" / "whisper-small" / "config.json").read_text())
    connector = build_connector(
        UniMoEConnectorConfig(type="whisper_decoder", num_query_tokens=6, backbone_config=whisper), 32, 64
    ).eval()
    connector.load_state_dict(weights)
    connector.decoder.set_attn_implementation(implementation)
    tensors = load_tensors(folder / f"cases_{cases}.safetensors", "whisper_encoder_out", "aligner_")
    for case in ("speech_short", "speech_long"):
        features = tensors[f"{case}.whisper_encoder_out"]
        queries = connector.query_tokens.expand(len(features), -1, -1)
        states = connector.read(queries, features)
        torch.testing.assert_close(states, tensors[f"{case}.aligner_decoder_out"], atol=2e-5, rtol=0)
        torch.testing.assert_close(connector(features), tensors[f"{case}.aligner_out"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", ["mlp_moe_a", "mlp_moe_b"])
@torch.no_grad()
def test_sparse_connector_matches_the_original(golden, case):
    folder = golden("cumo")
    sizes = json.loads((folder / "components.json").read_text())[case]
    tensors = load_tensors(folder / "components.safetensors", f"{case}.")
    tensors = {name.removeprefix(f"{case}."): value.float() for name, value in tensors.items()}
    sparsity = {"num_experts": sizes["num_experts"], "top_k": sizes["top_k"]}
    connector = build_connector(UniMoEConnectorConfig(sparsity=sparsity), sizes["in_dim"], sizes["out_dim"])

    def stacked(name):
        return torch.stack([tensors[f"weights.experts.{expert}.{name}"] for expert in range(sizes["num_experts"])])

    connector.load_state_dict(
        {
            "gate.weight": tensors["weights.gate.weight"],
            "experts.up_proj": stacked("0.weight"),
            "experts.up_proj_bias": stacked("0.bias"),
            "experts.down_proj": stacked("2.weight"),
            "experts.down_proj_bias": stacked("2.bias"),
        }
    )
    torch.testing.assert_close(connector(tensors["input"]), tensors["output"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_mlp_is_linear_gelu_linear(features):
    connector = build_connector(UniMoEConnectorConfig(**CONFIGS["mlp2"]), INPUT_SIZE, OUTPUT_SIZE)
    original = nn.Sequential(nn.Linear(INPUT_SIZE, OUTPUT_SIZE), nn.GELU(), nn.Linear(OUTPUT_SIZE, OUTPUT_SIZE))
    original.load_state_dict(
        {
            name.replace("layers.1", "2").replace("layers.0", "0"): value
            for name, value in connector.state_dict().items()
        }
    )
    torch.testing.assert_close(connector(features), original(features), atol=0, rtol=0)


# --- inside a Transformers model


@torch.no_grad()
def test_shapes_and_batches(host, features):
    tokens = host.config.num_query_tokens if host.config.has_queries else features.shape[1]
    batched = host(features)
    assert batched.shape == (3, tokens, OUTPUT_SIZE)
    for row in range(3):
        torch.testing.assert_close(host(features[row : row + 1])[0], batched[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_round_trip(host, features, tmp_path):
    expected = host(features)
    host.save_pretrained(tmp_path)
    loaded, report = Host.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(loaded.eval()(features), expected, atol=0, rtol=0)
    torch.testing.assert_close(copy.deepcopy(host)(features), expected, atol=0, rtol=0)


@torch.no_grad()
def test_bfloat16(host, features, tmp_path):
    expected = host(features)
    host.save_pretrained(tmp_path)
    loaded = Host.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    got = loaded(features.bfloat16())
    assert got.dtype == torch.bfloat16
    # A router near a tie may choose another expert, hence the loose bound.
    assert (got.float() - expected).norm() / expected.norm() < 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", QUERY_TYPES)
def test_attention_implementations_reach_the_backbone_and_agree(name, features, tmp_path):
    torch.manual_seed(0)
    Host(UniMoEConnectorConfig(**copy.deepcopy(CONFIGS[name]))).save_pretrained(tmp_path)
    outputs = []
    for implementation in ("eager", "sdpa"):
        loaded = Host.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert [config._attn_implementation for config in attention_configs(loaded)] == [implementation]
        outputs.append(loaded(features))
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)
    loaded.set_attn_implementation("eager")
    assert [config._attn_implementation for config in attention_configs(loaded)] == ["eager"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_every_parameter_and_survive_checkpointing(host, features, reentrant):
    for config in attention_configs(host):
        for dropout in ("dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            if hasattr(config, dropout):
                setattr(config, dropout, 0.0)
    host = Host(host.config).train()
    gradients = []
    for checkpointing in (False, True):
        # The MLPs hold no layer that could be recomputed, which Transformers refuses.
        if checkpointing and host.config.has_queries:
            host.gradient_checkpointing_enable({"use_reentrant": reentrant})
        host.zero_grad()
        host(features).pow(2)[..., ::2].sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in host.named_parameters()})
    unused = {name for name, grad in gradients[0].items() if grad.abs().max() == 0}
    # A bias on all keys alike cancels in the softmax.
    assert all(name.endswith("key.bias") for name in unused)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dropout_only_in_training(features):
    torch.manual_seed(0)
    host = Host(UniMoEConnectorConfig(**copy.deepcopy(CONFIGS["qformer"])))
    host.eval()
    assert torch.equal(host(features), host(features))
    host.train()
    assert not torch.equal(host(features), host(features))


def test_queries_are_initialised():
    for name in QUERY_TYPES:
        host = Host(UniMoEConnectorConfig(**copy.deepcopy(CONFIGS[name])))
        assert host.connector.query_tokens.std().item() == pytest.approx(0.02, rel=0.3)
    assert not init_connector_weights(nn.Linear(2, 2))


def test_whisper_decoder_carries_no_vocabulary():
    connector = build_connector(UniMoEConnectorConfig(**copy.deepcopy(CONFIGS["whisper_decoder"])), INPUT_SIZE, 24)
    assert not any("embed_tokens" in name for name in connector.state_dict())
    assert connector.state_dict()["decoder.embed_positions.weight"].shape == (16, INPUT_SIZE)


@pytest.mark.parametrize(
    "changes, input_size, message",
    [
        ({"type": "qformer", "backbone_config": QFORMER}, 33, "`backbone_config.encoder_hidden_size` .32. must be"),
        ({"type": "qformer", "backbone_config": {**QFORMER, "use_qformer_text_input": True}}, 32, "reads no text"),
        ({"type": "whisper_decoder", "backbone_config": WHISPER}, 33, "`backbone_config.d_model` .32. must be"),
        ({"type": "whisper_decoder", "backbone_config": WHISPER}, 32, "`num_query_tokens` .50. must not exceed"),
    ],
)
def test_misfits_are_named(changes, input_size, message):
    with pytest.raises(ValueError, match=message):
        build_connector(UniMoEConnectorConfig(**copy.deepcopy(changes)), input_size, OUTPUT_SIZE)
