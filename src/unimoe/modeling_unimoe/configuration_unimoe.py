"""What a UniMoE model is made of: a text decoder, up to three towers with their connectors, and where FFNs are sparse.

A family of checkpoints is a setting of these classes, never a class of its own.
"""

import copy
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# Written into every saved config, so that a hub folder loads with `trust_remote_code=True` where the package is absent.
AUTO_MAP = {
    "AutoConfig": "configuration_unimoe.UniMoEConfig",
    "AutoModel": "modeling_unimoe.UniMoEModel",
    "AutoModelForMultimodalLM": "modeling_unimoe.UniMoEForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_unimoe.UniMoEForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_unimoe.UniMoEForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "any-to-text": {
        "impl": "pipeline_unimoe.AnyToTextPipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    }
}
LAYER_PATTERNS = ("all", "even", "odd", "first_half", "second_half")
CONNECTOR_TYPES = ("linear", "mlp", "qformer", "whisper_decoder")
MODALITIES = ("image", "video", "audio", "speech")


def resolve_layers(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """The chosen layer indices of a stack of `num_layers`, listed ones in the order of the list.

    Args:
        layers: `"all"`, `"even"` (0, 2, ...), `"odd"`, `"first_half"`, `"second_half"`, or layer indices.

    Raises:
        ValueError: Neither a known pattern nor a list, an index that the stack lacks or that stands there twice, or no layer at
            all.
    """
    patterns = {
        "all": range(num_layers),
        "even": range(0, num_layers, 2),
        "odd": range(1, num_layers, 2),
        "first_half": range(num_layers // 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    if not isinstance(layers, Iterable) or (isinstance(layers, str) and layers not in patterns):
        raise ValueError(f"`layers` must be one of {LAYER_PATTERNS} or a list of indices, got {layers!r}")
    chosen = list(patterns[layers] if isinstance(layers, str) else layers)
    for index in chosen:
        if not isinstance(index, Integral) or isinstance(index, bool) or not 0 <= index < num_layers:
            raise ValueError(f"`layers` holds {index!r}, but the stack has the layers 0 to {num_layers - 1}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"`layers` holds an index twice: {chosen}")
    if not chosen:
        raise ValueError(f"`layers`={layers!r} chooses none of {num_layers} layers")
    # NumPy's integers do not go into a JSON file.
    return [int(index) for index in chosen]


def check_capacities(capacity_factor: Any, eval_capacity_factor: Any, min_capacity: Any) -> None:
    """Refuses capacities that would leave experts without any token.

    Raises:
        ValueError: A factor is neither None nor a positive number, or the least capacity no whole number from 0 on.
    """
    for name, factor in {"capacity_factor": capacity_factor, "eval_capacity_factor": eval_capacity_factor}.items():
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        # Asked for like this, since no comparison with NaN holds.
        if factor is not None and not (is_number and factor > 0):
            raise ValueError(f"`{name}` must be a positive number, or None for no limit, got {factor!r}")
    if not isinstance(min_capacity, int) or isinstance(min_capacity, bool) or min_capacity < 0:
        raise ValueError(f"`min_capacity` must be a whole number that is not negative, got {min_capacity!r}")


@strict
class UniMoESparsityConfig(PreTrainedConfig):
    r"""
    Where a stack of FFNs is sparse, and how its routers choose. One description serves the text decoder, the vision
    encoder and the MLP of a connector.

    Args:
        layers: Which layers hold experts: `"all"`, `"even"` (0, 2, 4, ...), `"odd"`, `"first_half"`, `"second_half"` or a
            list of layer indices. A connector has one MLP and ignores it.
        num_experts: Experts per sparse layer; one number, or one per entry of `layers`.
        top_k: Experts that each token visits.
        norm_topk_prob: Whether the weights of the chosen experts are scaled to sum to one (Uni-MoE, MoE-LLaVA top-2, CuMo).
            Otherwise they are the probabilities over all experts.
        router_dtype: Precision of the router's linear map; `None` is the model's own, `"float32"` the gate of MoE-LLaVA.
        router_noise: `"gumbel"` adds Gumbel noise to the choice of all experts but the first, in training and inference
            alike, and to the logits that losses are computed from, as the eight-expert Uni-MoE's original does;
            `"gumbel_choice"` leaves the losses without it, as MoE-LLaVA's does; `None` routes deterministically.
        router_modality_maps: Whether a linear map for each modality stands before the router; decoder only.
        capacity_factor, eval_capacity_factor: In training and in evaluation an expert takes at most `ceil(tokens / num_experts *
            top_k * factor)` tokens of a forward pass, padding counted; the others lose that choice. `None`: no limit.
        min_capacity: The least such number.
        random_token_selection: Whether chance decides who finds room, in both modes (DeepSpeed's top-1 gate); otherwise the
            order of the tokens. Needs `top_k=1`.
        residual: Whether a dense MLP stands beside the experts, mixed with their output token by token.
        router_aux_loss_coef: Weight of the load-balancing loss in the training loss; 0 leaves it out.
        router_z_loss_coef: Weight of the mean squared logsumexp of the router logits; 0 leaves it out.
        router_modality_loss_coef: Weight of the loss that draws each modality to its `modality_experts`; decoder only.
        router_divergence_loss_coef: Weight of the loss that draws the modalities' routing apart; decoder only.
        modality_experts: The experts meant for each modality, such as `{"image": [1, 5]}`.
        router_loss_scope: Whose tokens the load-balancing loss counts together: those of the `"batch"`, or of each `"sample"`
            (a row of text, an image, a tile) with the mean over samples (CuMo's vision).
        router_loss_reduction: `"sum"` or `"mean"` of the load-balancing and z losses over sparse layers and passes.
        router_loss_counts_padding: Whether padding counts in these two, as in MoE-LLaVA and CuMo.

    Raises:
        ValueError: A value is out of its range or contradicts another; the message names the field.
    """

    model_type = "unimoe_sparsity"

    layers: str | list[int] = "all"
    num_experts: int | list[int] = 4
    top_k: int = 2
    norm_topk_prob: bool = True
    router_dtype: str | None = None
    router_noise: str | None = None
    router_modality_maps: bool = False
    capacity_factor: float | int | None = None
    eval_capacity_factor: float | int | None = None
    min_capacity: int = 0
    random_token_selection: bool = False
    residual: bool = False
    router_aux_loss_coef: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    router_modality_loss_coef: float | int = 0.0
    router_divergence_loss_coef: float | int = 0.0
    modality_experts: dict[str, list[int]] | None = None
    router_loss_scope: Literal["batch", "sample"] = "batch"
    router_loss_reduction: Literal["sum", "mean"] = "sum"
    router_loss_counts_padding: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if isinstance(self.layers, str):
            if self.layers not in LAYER_PATTERNS:
                raise ValueError(f"`layers` must be one of {LAYER_PATTERNS} or a list of indices, got {self.layers!r}")
        else:
            resolve_layers(self.layers, max(self.layers, default=0) + 1)
        counts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        if not counts or min(counts) < 2:
            raise ValueError(f"`num_experts` must be at least 2, got {self.num_experts}")
        if not 1 <= self.top_k <= min(counts):
            raise ValueError(f"`top_k` must lie between 1 and `num_experts` ({min(counts)}), got {self.top_k}")
        if isinstance(self.num_experts, list) and isinstance(self.layers, list):
            if len(self.num_experts) != len(self.layers):
                raise ValueError(
                    f"`num_experts` lists {len(self.num_experts)} counts for the {len(self.layers)} indices in `layers`"
                )
        if self.router_dtype not in (None, "float32"):
            raise ValueError(f"`router_dtype` must be None or 'float32', got {self.router_dtype!r}")
        if self.router_noise not in (None, "gumbel", "gumbel_choice"):
            raise ValueError(f"`router_noise` must be None, 'gumbel' or 'gumbel_choice', got {self.router_noise!r}")
        check_capacities(self.capacity_factor, self.eval_capacity_factor, self.min_capacity)
        if self.random_token_selection and self.top_k != 1:
            raise ValueError(f"`random_token_selection` needs `top_k`=1, got {self.top_k}")
        for name in ("aux_loss", "z_loss", "modality_loss", "divergence_loss"):
            name = f"router_{name}_coef"
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        for name, indices in (self.modality_experts or {}).items():
            if name not in MODALITIES or not indices or not 0 <= min(indices) <= max(indices) < min(counts):
                raise ValueError(
                    f"`modality_experts` must list experts below {min(counts)} for {MODALITIES}, got {name}: {indices}"
                )
        if self.router_modality_loss_coef and not self.modality_experts:
            raise ValueError("`router_modality_loss_coef` needs `modality_experts`")

    @property
    def block_options(self) -> dict[str, Any]:
        """The arguments of a sparse block beyond its experts and their number."""
        names = "norm_topk_prob router_dtype capacity_factor eval_capacity_factor min_capacity random_token_selection residual"
        return {name: getattr(self, name) for name in names.split()}

    def layer_indices(self, num_layers: int) -> list[int]:
        """The sparse layers of a stack of `num_layers`, in the order in which `num_experts` counts for them.

        Raises:
            ValueError: `layers` names a layer that the stack lacks, or `num_experts` has not one count per sparse layer.
        """
        indices = resolve_layers(self.layers, num_layers)
        if isinstance(self.num_experts, list) and len(self.num_experts) != len(indices):
            raise ValueError(f"`num_experts` lists {len(self.num_experts)} counts for {len(indices)} sparse layers")
        return indices


@strict
class UniMoEAudioConfig(PreTrainedConfig):
    r"""
    The BEATs encoder for audio events. Defaults are those of BEATs_iter3+ AS2M (Chen et al. 2022, arXiv 2212.09058).

    Args:
        num_mel_bins: Height of the filterbank "image".
        patch_size: Side of the square patches that it is cut into.
        patch_embed_dim: Width of the patch embedding; projected to `hidden_size` where they differ.
        conv_bias: Whether the patch embedding has a bias.
        num_conv_pos_embeddings: Kernel size of the convolutional position embedding.
        num_conv_pos_embedding_groups: Its groups.
        relative_position_embedding: Whether attention has a bucketed relative-position bias.
        num_buckets: Buckets of that bias.
        max_bucket_distance: Distance in tokens from which on all pairs share the last bucket.
        gated_relative_position: Whether that bias is scaled by a gate computed from the query.
        deep_norm: Whether residuals are scaled by `(2 * num_hidden_layers) ** 0.25` (post-norm layers only).
        layer_norm_first: Pre-norm layers instead of post-norm ones.
        layerdrop: Probability of skipping a layer in training.
    """

    model_type = "unimoe_audio"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    num_mel_bins: int = 128
    patch_size: int = 16
    patch_embed_dim: int = 512
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    relative_position_embedding: bool = True
    num_buckets: int = 320
    max_bucket_distance: int = 800
    gated_relative_position: bool = True
    deep_norm: bool = True
    layer_norm_first: bool = False
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    dropout_input: float | int = 0.0
    layerdrop: float | int = 0.05
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})"
            )
        if self.hidden_size % self.num_conv_pos_embedding_groups:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_conv_pos_embedding_groups` "
                f"({self.num_conv_pos_embedding_groups})"
            )
        if self.num_mel_bins % self.patch_size:
            raise ValueError(
                f"`num_mel_bins` ({self.num_mel_bins}) must be a multiple of `patch_size` ({self.patch_size})"
            )
        if self.num_buckets % 2:
            raise ValueError(f"`num_buckets` must be even (half for each direction), got {self.num_buckets}")
        if self.deep_norm and self.layer_norm_first:
            raise ValueError("`deep_norm` scales the residuals of post-norm layers; it excludes `layer_norm_first`")


@strict
class UniMoEConnectorConfig(PreTrainedConfig):
    r"""
    The map from a tower's features to the decoder's embedding space.

    Args:
        type: `"linear"`; `"mlp"` (`num_layers` Linears with an activation between); `"qformer"` (learned queries in a
            BLIP-2 Q-Former, then a projector); `"whisper_decoder"` (learned queries in a Whisper decoder, then a projector).
        hidden_size: Width between the Linears of an MLP; `None` is the decoder's width.
        hidden_act: Activation of the MLP and of a projector with several layers.
        num_layers: Linears of the `"mlp"` type.
        num_query_tokens: Learned queries, that is tokens per item, of the two query types.
        projector_num_layers: Linears after the queries.
        backbone_config: Configuration of the Q-Former (`blip_2_qformer`) or of the decoder (`whisper`).
        sparsity: Makes the MLP a sparse block (CuMo's MLP-MoE); only for `type="mlp"` with two layers.
    """

    model_type = "unimoe_connector"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="blip_2_qformer", optional=True),
        "sparsity": SubConfigSpec(config_class=UniMoESparsityConfig, optional=True),
    }

    type: str = "mlp"
    hidden_size: int | None = None
    hidden_act: str = "gelu"
    num_layers: int = 2
    num_query_tokens: int = 50
    projector_num_layers: int = 1
    backbone_config: dict | PreTrainedConfig | None = None
    sparsity: dict | PreTrainedConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        backbones = {"qformer": "blip_2_qformer", "whisper_decoder": "whisper"}
        if self.type not in CONNECTOR_TYPES:
            raise ValueError(f"`type` must be one of {CONNECTOR_TYPES}, got {self.type!r}")
        if self.type in backbones:
            if self.backbone_config is None:
                self.backbone_config = {"model_type": backbones[self.type]}
            elif isinstance(self.backbone_config, dict):
                self.backbone_config = {"model_type": backbones[self.type], **self.backbone_config}
        elif self.backbone_config is not None:
            raise ValueError(f"`backbone_config` belongs to the types {tuple(backbones)}, not to {self.type!r}")
        # `backbone_config` is also the name of Transformers' setting for vision backbones, which it would resolve itself.
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**kwargs)
        if self.type in backbones and self.backbone_config.model_type != backbones[self.type]:
            raise ValueError(
                f"`backbone_config` of a {self.type!r} connector must be a {backbones[self.type]!r} config, "
                f"got {self.backbone_config.model_type!r}"
            )
        if self.sparsity is not None and (self.type != "mlp" or self.num_layers != 2):
            raise ValueError("`sparsity` needs a connector of `type`='mlp' with `num_layers`=2")
        if self.sparsity is not None and not isinstance(self.sparsity.num_experts, int):
            raise ValueError("`sparsity.num_experts` of a connector must be one number")
        for name in ("num_layers", "num_query_tokens", "projector_num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")

    @property
    def has_queries(self) -> bool:
        """Whether an item becomes `num_query_tokens` tokens, whatever the tower's sequence length."""
        return self.type in ("qformer", "whisper_decoder")


@strict
class UniMoEConfig(PreTrainedConfig):
    r"""
    Configuration of a UniMoE model. A tower that is `None` is absent: no weights, no placeholders, no inputs.

    Args:
        text_config: Any Transformers decoder (`llama`, `mistral`, `mixtral`, `qwen2`, `phi`, `stablelm`, ...).
        vision_config: `clip_vision_model` or `siglip_vision_model`; serves images and video frames.
        audio_config: [`UniMoEAudioConfig`] (BEATs), for audio events.
        speech_config: `whisper`, whose encoder is used, for speech.
        vision_connector_config, audio_connector_config, speech_connector_config: How each tower's features reach the
            decoder. Default: two-layer MLP, Q-Former, Whisper decoder on learned queries.
        text_sparsity, vision_sparsity: Which FFNs of the decoder and of the vision encoder are sparse ([`UniMoESparsityConfig`]).
        vision_feature_layer: Index into the vision tower's hidden states.
        vision_feature_select_strategy: `"default"` drops the first token (the class token of CLIP; of SigLIP, which has
            none, the first patch, as MoE-LLaVA does); `"full"` keeps all.
        vision_scales: Sizes at which the vision tower sees an image, in multiples of its own, such as `[1, 3]` for CuMo: a
            larger one is cut into tiles, and the features of all sizes stand side by side, so an image costs as many tokens
            as at one size. `None`: its own size alone.
        image_token_id, video_token_id, audio_token_id, speech_token_id: Placeholder ids. They may lie at or beyond the
            decoder's `vocab_size`: placeholders are never embedded. Default: `vocab_size` and the three ids after it.

    Raises:
        ValueError: A value is out of its range or contradicts another; the message names the field.
    """

    model_type = "unimoe"
    # Of what the model returns, evaluation collects the logits alone; not every batch has the rest.
    keys_to_ignore_at_inference = [
        *("past_key_values", "aux_loss", "router_logits", "vision_router_logits", "connector_router_logits"),
        *(f"{modality}_hidden_states" for modality in MODALITIES),
    ]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "audio_config": SubConfigSpec(config_class=UniMoEAudioConfig, optional=True),
        "speech_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True),
        "vision_connector_config": SubConfigSpec(config_class=UniMoEConnectorConfig, optional=True),
        "audio_connector_config": SubConfigSpec(config_class=UniMoEConnectorConfig, optional=True),
        "speech_connector_config": SubConfigSpec(config_class=UniMoEConnectorConfig, optional=True),
        "text_sparsity": SubConfigSpec(config_class=UniMoESparsityConfig, optional=True),
        "vision_sparsity": SubConfigSpec(config_class=UniMoESparsityConfig, optional=True),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    speech_config: dict | PreTrainedConfig | None = None
    vision_connector_config: dict | PreTrainedConfig | None = None
    audio_connector_config: dict | PreTrainedConfig | None = None
    speech_connector_config: dict | PreTrainedConfig | None = None
    text_sparsity: dict | PreTrainedConfig | None = None
    vision_sparsity: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    vision_scales: list[int] | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    speech_token_id: int | None = None
    output_router_logits: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.custom_pipelines = kwargs.pop("custom_pipelines", None) or {}
        # A constant of the class, whatever folder a config comes from.
        kwargs["auto_map"] = dict(AUTO_MAP)
        default_connectors = {"vision": "mlp", "audio": "qformer", "speech": "whisper_decoder"}
        for tower, connector_type in default_connectors.items():
            name = f"{tower}_connector_config"
            if getattr(self, f"{tower}_config") is not None and getattr(self, name) is None:
                setattr(self, name, UniMoEConnectorConfig(**self._default_connector(tower, connector_type)))
        super().__post_init__(**kwargs)
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        vocab_size = self.text_config.vocab_size
        for offset, modality in enumerate(MODALITIES):
            if getattr(self, f"{modality}_token_id") is None:
                setattr(self, f"{modality}_token_id", vocab_size + offset)
        self._check_towers()
        self._check_sparsity()
        self._check_token_ids()

    def _default_connector(self, tower: str, connector_type: str) -> dict:
        """A connector of `connector_type` whose Q-Former or Whisper decoder fits the tower."""
        config = getattr(self, f"{tower}_config")
        config = config.to_dict() if isinstance(config, PreTrainedConfig) else config
        backbone = None
        if connector_type == "qformer":
            width = config.get("hidden_size", UniMoEAudioConfig.hidden_size)
            backbone = {
                "hidden_size": width,
                "encoder_hidden_size": width,
                "intermediate_size": 4 * width,
                "num_attention_heads": config.get("num_attention_heads", UniMoEAudioConfig.num_attention_heads),
            }
        elif connector_type == "whisper_decoder":
            backbone = config
        return {"type": connector_type, "backbone_config": backbone}

    def _check_towers(self):
        for tower in ("vision", "audio", "speech"):
            if getattr(self, f"{tower}_config") is None and getattr(self, f"{tower}_connector_config") is not None:
                raise ValueError(f"`{tower}_connector_config` is set, but `{tower}_config` is None: there is no tower")
        if self.vision_config is not None:
            types = ("clip_vision_model", "siglip_vision_model")
            if self.vision_config.model_type not in types:
                raise ValueError(f"`vision_config` must be one of {types}, got {self.vision_config.model_type!r}")
            depth = self.vision_config.num_hidden_layers
            if not -depth - 1 <= self.vision_feature_layer <= depth:
                raise ValueError(
                    f"`vision_feature_layer`={self.vision_feature_layer} is outside the {depth + 1} hidden states of "
                    "`vision_config`"
                )
            if self.vision_connector_config.has_queries:
                raise ValueError("`vision_connector_config.type` must be 'linear' or 'mlp'")
        self._check_scales()
        if self.speech_config is not None and self.speech_config.model_type != "whisper":
            raise ValueError(f"`speech_config` must be a 'whisper' config, got {self.speech_config.model_type!r}")
        for tower, width in (("audio", "hidden_size"), ("speech", "d_model")):
            connector = getattr(self, f"{tower}_connector_config")
            if connector is None or connector.backbone_config is None:
                continue
            tower_width = getattr(getattr(self, f"{tower}_config"), width)
            backbone = connector.backbone_config
            reads = backbone.d_model if connector.type == "whisper_decoder" else backbone.encoder_hidden_size
            if reads != tower_width:
                raise ValueError(
                    f"`{tower}_connector_config.backbone_config` reads features of width {reads}, but `{tower}_config` "
                    f"gives {tower_width}"
                )

    def _check_scales(self):
        if self.vision_scales is None:
            return
        if self.vision_config is None:
            raise ValueError("`vision_scales` is set, but `vision_config` is None: there is no tower")
        if not self.vision_scales or self.vision_scales[0] != 1 or min(self.vision_scales) < 1:
            raise ValueError(
                f"`vision_scales` must begin with 1, the image at the tower's own size, and hold positive numbers, got "
                f"{self.vision_scales}"
            )
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        if self.num_image_tokens != patches:
            raise ValueError(
                f"`vision_scales` needs the features of all patches and of nothing else, but `vision_feature_select_strategy`"
                f"={self.vision_feature_select_strategy!r} gives {self.num_image_tokens} tokens for {patches} patches of a "
                f"{self.vision_config.model_type!r}"
            )

    def _check_sparsity(self):
        if self.text_sparsity is not None:
            if getattr(self.text_config, "num_local_experts", None):
                self._check_own_experts()
            self._check_layers("text_sparsity", self.text_config.num_hidden_layers)
        if self.vision_sparsity is not None:
            if self.vision_config is None:
                raise ValueError("`vision_sparsity` is set, but `vision_config` is None: there is no tower")
            self._check_layers("vision_sparsity", self.vision_config.num_hidden_layers)

    def _check_own_experts(self):
        """A decoder with experts of its own is what it is: `text_sparsity` may only add losses to it."""
        told, text = self.text_sparsity, self.text_config
        plain = UniMoESparsityConfig(layers="all", num_experts=text.num_local_experts, top_k=text.num_experts_per_tok)
        fields = [name for name in UniMoESparsityConfig.__annotations__ if "loss" not in name]
        differing = [name for name in fields if getattr(told, name) != getattr(plain, name)]
        if differing:
            raise ValueError(
                f"`text_sparsity` is set, but `text_config` ({text.model_type!r}) has experts of its own; it may only weigh "
                f"their losses and repeat their numbers, yet {', '.join(differing)} differ"
            )

    def _check_layers(self, name: str, num_layers: int):
        try:
            getattr(self, name).layer_indices(num_layers)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from None

    def _check_token_ids(self):
        ids = {f"{modality}_token_id": getattr(self, f"{modality}_token_id") for modality in MODALITIES}
        for name, value in ids.items():
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}")
            clash = [other for other, taken in ids.items() if other != name and taken == value]
            if clash:
                raise ValueError(f"`{name}` and `{clash[0]}` are the same id, {value}")

    @property
    def input_modalities(self) -> tuple[str, ...]:
        """The kinds of item that this model takes beside text, a subset of image, video, audio, speech."""
        towers = {"image": "vision", "video": "vision", "audio": "audio", "speech": "speech"}
        return tuple(name for name in MODALITIES if getattr(self, f"{towers[name]}_config") is not None)

    @property
    def num_image_tokens(self) -> int | None:
        """Tokens per image and per video (whose frames are averaged); None without a vision tower."""
        if self.vision_config is None:
            return None
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        class_token = int(self.vision_config.model_type == "clip_vision_model")
        return patches + class_token - int(self.vision_feature_select_strategy == "default")

    @property
    def vision_feature_size(self) -> int | None:
        """Width of an image's features, the connector's input; None without a vision tower."""
        if self.vision_config is None:
            return None
        return self.vision_config.hidden_size * len(self.vision_scales or [1])

    @property
    def num_audio_tokens(self) -> int | None:
        """Tokens per audio chunk; None without an audio tower, or where they depend on the chunk's length."""
        return self._num_query_tokens("audio")

    @property
    def num_speech_tokens(self) -> int | None:
        """Tokens per 30 s chunk of speech; None without a speech tower."""
        if self.speech_config is not None and not self.speech_connector_config.has_queries:
            return self.speech_config.max_source_positions
        return self._num_query_tokens("speech")

    def _num_query_tokens(self, tower: str) -> int | None:
        connector = getattr(self, f"{tower}_connector_config")
        return connector.num_query_tokens if connector is not None and connector.has_queries else None

    @property
    def custom_pipelines(self) -> dict[str, Any]:
        """The pipeline tasks for `trust_remote_code=True`, without ours where the installed package has registered it."""
        ours = CUSTOM_PIPELINES if type(self).__module__.startswith("transformers_modules") else {}
        # A copy, since `pipeline` puts classes in the place of the names.
        return copy.deepcopy({**ours, **self._other_pipelines})

    @custom_pipelines.setter
    def custom_pipelines(self, pipelines: dict[str, Any]):
        # Transformers sets the tasks of a user's own pipeline when that is saved. Ours is a constant of the class.
        self._other_pipelines = {task: info for task, info in pipelines.items() if task not in CUSTOM_PIPELINES}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "UniMoEConfig":
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            # Transformers warns and goes on with all defaults: billions of random weights before a tensor is found missing.
            raise ValueError(
                f"The config describes a {model_type!r}, not a {cls.model_type!r}: load it with AutoConfig or AutoModel, and "
                "turn an official Uni-MoE, MoE-LLaVA or CuMo checkpoint into one with `unimoe convert`"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["custom_pipelines"] = copy.deepcopy({**CUSTOM_PIPELINES, **output.pop("_other_pipelines")})
        return output


__all__ = ["UniMoEAudioConfig", "UniMoEConfig", "UniMoEConnectorConfig", "UniMoESparsityConfig"]
