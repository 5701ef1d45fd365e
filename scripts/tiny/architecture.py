"""The tiny checkpoint's shape before its decoder becomes sparse, and its processor."""

from __future__ import annotations

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, WhisperConfig

from unimoe import (
    UniMoEAudioConfig,
    UniMoEConfig,
    UniMoEConnectorConfig,
    UniMoEFeatureExtractor,
    UniMoEProcessor,
)

IMAGE_SIDE = 72
FRAMES = 8
# Sound events last a few seconds; a longer sound is cut into chunks of five.
AUDIO_CHUNK_SAMPLES = 5 * 16_000
# Whisper's usual window of 30 s.
SPEECH_FRAMES = 3000
CONTEXT = 1024
# Narrow layers want larger weights than the usual 0.02, which is made for a width of 768.
INITIALIZER_RANGE = 0.06
# The prompt of Uni-MoE without its system text, which would only cost time here.
CHAT_TEMPLATE = r"""
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for block in content -%}
            {{- block['text'] if block['type'] == 'text' else '<' ~ block['type'] ~ '>\n' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' ~ render(message['content']) ~ ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' ~ render(message['content']) ~ '</s>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("role '" ~ message['role'] ~ "': only 'user' and 'assistant'.") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""
MODALITIES = ("image", "video", "audio", "speech")


def build_config(tokenizer: PreTrainedTokenizerFast) -> UniMoEConfig:
    """The dense model; stage 3 puts experts into its decoder."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=12,
        # One operation where CLIP's own approximation takes three.
        hidden_act="gelu",
    )
    audio = UniMoEAudioConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        patch_embed_dim=64,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=8,
        num_buckets=64,
        max_bucket_distance=256,
        layerdrop=0.0,
        initializer_range=INITIALIZER_RANGE,
    )
    speech = WhisperConfig(
        d_model=96,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=256,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=256,
        max_source_positions=SPEECH_FRAMES // 2,
        max_target_positions=16,
        # The connector's decoder starts from learned queries, so its word embeddings are never read.
        vocab_size=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=1,
        dropout=0.0,
        init_std=INITIALIZER_RANGE,
    )
    audio_connector = UniMoEConnectorConfig(
        type="qformer",
        num_query_tokens=8,
        backbone_config={
            "hidden_size": 96,
            "encoder_hidden_size": 96,
            "intermediate_size": 192,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": INITIALIZER_RANGE,
        },
    )
    speech_connector = UniMoEConnectorConfig(
        type="whisper_decoder", num_query_tokens=8, backbone_config=speech.to_dict()
    )
    return UniMoEConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        speech_config=speech,
        audio_connector_config=audio_connector,
        speech_connector_config=speech_connector,
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
        **{f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in MODALITIES},
        **special,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, config: UniMoEConfig) -> UniMoEProcessor:
    return UniMoEProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        ),
        tokenizer=tokenizer,
        feature_extractor=UniMoEFeatureExtractor(audio_chunk_samples=AUDIO_CHUNK_SAMPLES),
        num_image_tokens=config.num_image_tokens,
        num_video_tokens=config.num_image_tokens,
        num_audio_tokens=config.num_audio_tokens,
        num_speech_tokens=config.num_speech_tokens,
        num_video_frames=FRAMES,
        max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )
