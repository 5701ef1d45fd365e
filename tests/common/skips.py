"""Which of Transformers' common tests do not run on UniMoE, and why. `docs/testing.md` shows the same table.

Names are patterns (`*` stands for anything). No test may be skipped without an entry here; `conftest.py` sees to that.
"""

import unittest
from fnmatch import fnmatchcase

from transformers.utils import is_torchvision_available

MODEL, PROCESSOR, PIPELINE = "UniMoEModelTest", "UniMoEProcessorTest", "UniMoEPipelineTest"

NO_VIDEO_PROCESSOR = "UniMoE has no video processor, which would need torchvision; its processor reads videos itself"
OTHER_TASK = "UniMoE has no head for this task"
NO_FLASH = "BEATs' bias on attention excludes Flash Attention; a model with BEATs takes it for its other parts only"
ACCELERATOR = "needs an accelerator"
DEEPSPEED = "needs DeepSpeed"
PILLOW = (
    "needs a machine without torchvision, by which `AutoImageProcessor` then resizes; UniMoE's processor always does so by "
    "Pillow, as the originals"
)

# Tests of what UniMoE does not have or does otherwise.
DOES_NOT_APPLY = {
    MODEL: {
        "test_can_init_all_missing_weights": "compares a model from an empty checkpoint, which UniMoE refuses; for "
        "classes outside its own package, Transformers leaves the special initial values of CLIP and Whisper out there",
        "test_encoder_decoder_loss_no_double_shift": "UniMoE is no encoder-decoder",
        "test_flash_attn_2_can_compile_*": NO_FLASH,
        "test_flash_attn_2_fp32_ln": NO_FLASH,
        "test_flash_attn_*_from_config": NO_FLASH,
        "test_flash_attn_*_inference_equivalence*": NO_FLASH,
        "test_keep_in_fp32_modules*": "UniMoE has no modules that stay in float32 in a model of lower precision",
        "test_model_rope_with_partial_rotation": "the decoder under test rotates all of a head, as Llama does",
        "test_resize_position_vector_embeddings": "the decoder has no position vectors, and the towers' are fixed",
        "test_reverse_loading_mapping": "UniMoE renames no parameters when it loads; converted checkpoints have its names",
        "test_sdpa_can_dispatch_non_composite_models": "UniMoE is a composite model; the test for those runs",
        "test_sliding_window_mask": "the decoder under test has no sliding window, as Llama",
        "test_vision_axial_rope": "the vision tower has position vectors, no rotary ones",
    },
    PROCESSOR: {
        "test_apply_chat_template_tool_calls_no_content": "the chat template of Uni-MoE has no tools",
        "test_apply_chat_template_video*": NO_VIDEO_PROCESSOR,
        "test_apply_chat_template_decoded_video*": NO_VIDEO_PROCESSOR,
        "test_chat_template_audio_from_video": NO_VIDEO_PROCESSOR,
        "test_chat_template_audio_sampling_rate": "`apply_chat_template` does not decode sounds and so passes no "
        "sampling rate on; the processor decodes them, and files know their rate",
        "test_get_num_multimodal_tokens_matches_processor_call_audio": "passes arrays of sound without a sampling "
        "rate, which UniMoE refuses",
        "test_get_num_multimodal_tokens_matches_processor_call_video": NO_VIDEO_PROCESSOR,
        "test_init_arguments_not_in_processor_kwargs": "a call may lower the processor's `max_length`, which is the "
        "model's context; the test leaves open whether such arguments are right",
        "test_model_input_names": "passes no speech and no videos of different lengths, which have inputs of their "
        "own; `test_model_input_names_of_all_media` does",
        "test_replacement_offsets": "placeholders are expanded after tokenisation, so there is no expanded text",
        "test_*_videos": NO_VIDEO_PROCESSOR,
    },
    PIPELINE: {
        "test_pipeline_any_to_any*": "UniMoE's task is any-to-text; any-to-any needs torchvision and knows no speech",
        **{
            f"test_pipeline_{task}*": OTHER_TASK
            for task in (
                "audio_classification",
                "automatic_speech_recognition",
                "depth_estimation",
                "document_question_answering",
                "fill_mask",
                "image_classification",
                "image_feature_extraction",
                "image_segmentation",
                "mask_generation",
                "object_detection",
                "table_question_answering",
                "text_classification",
                "text_to_audio",
                "token_classification",
                "video_classification",
                "zero_shot",
            )
        },
    },
}

# Tests that run where the machine has what they need.
NEEDS_MORE = {
    MODEL: {
        "test_can_load_with_*": ACCELERATOR,
        "test_cpu_offload": ACCELERATOR,
        "test_disk_offload_*": ACCELERATOR,
        "test_flash_attn_*_can_dispatch_composite_models": "needs an accelerator with Flash Attention",
        "test_flex_attention_with_grads": ACCELERATOR,
        "test_kernels_can_load_without_crashing": "needs the package `kernels`",
        "test_model_parallelism": "needs several accelerators",
        "test_resize_*_with_deepspeed": DEEPSPEED,
        "test_resize_*_with_deepspeed_multi_gpu": DEEPSPEED,
        "test_sdpa_can_compile_dynamic": ACCELERATOR,
        "test_sdpa_can_dispatch_on_flash": ACCELERATOR,
        "test_torch_compile_for_training": ACCELERATOR,
    },
    PROCESSOR: {
        "test_processor_from_and_save_pretrained_as_nested_dict": PILLOW,
        "test_subprocessor_defaults_1_images": PILLOW,
    },
}


def without_inapplicable_tests(test_class: type[unittest.TestCase]) -> type[unittest.TestCase]:
    """A class decorator: skips the tests of `DOES_NOT_APPLY`, each with its reason, and with torchvision those that fail on it."""
    table = dict(DOES_NOT_APPLY[test_class.__name__])
    if is_torchvision_available():
        table |= {name: why for name, why in NEEDS_MORE.get(test_class.__name__, {}).items() if why == PILLOW}
    for name in unittest.defaultTestLoader.getTestCaseNames(test_class):
        reason = _find(table, name)
        if reason is not None:
            setattr(test_class, name, unittest.skip(reason)(getattr(test_class, name)))
    return test_class


def reason_to_skip(class_name: str, test_name: str) -> str | None:
    """The reason that the tables give for a skipped test; None where they have none."""
    tables = (DOES_NOT_APPLY.get(class_name, {}), NEEDS_MORE.get(class_name, {}))
    return next((reason for table in tables if (reason := _find(table, test_name)) is not None), None)


def _find(table: dict[str, str], test_name: str) -> str | None:
    return next((reason for pattern, reason in table.items() if fnmatchcase(test_name, pattern)), None)


def as_markdown() -> str:
    """Both tables, for the documentation."""
    lines = ["| Test class | Test | Why it is skipped |", "|---|---|---|"]
    for tables, prefix in ((DOES_NOT_APPLY, ""), (NEEDS_MORE, "runs elsewhere: ")):
        for class_name, table in tables.items():
            lines += [f"| `{class_name}` | `{pattern}` | {prefix}{reason} |" for pattern, reason in table.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown())
