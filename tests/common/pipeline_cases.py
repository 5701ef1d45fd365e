"""What the pipeline tests do with one task's pipeline; Transformers' own such classes are not in its source distribution.

A class makes a pipeline and examples for it, and checks what the pipeline gives for them. The common test then feeds the
examples to it in batches.
"""

from typing import Any
from unittest import TestCase

import torch
from processing.tiny_processor import frames, image, sound
from transformers import pipeline

SAMPLING_RATE = 16000
NEW_TOKENS = 4


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    """A chat of one message."""
    return [{"role": "user", "content": list(content)}]


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


class _PipelineTests(TestCase):
    task: str

    def run_pipeline_test(self, pipe: Any, examples: list[Any]):
        raise NotImplementedError

    def check_texts(self, outputs: list[dict[str, Any]]):
        self.assertTrue(outputs)
        for output in outputs:
            self.assertIsInstance(output["generated_text"], str)


class AnyToTextPipelineTests(_PipelineTests):
    def get_test_pipeline(self, model, tokenizer, processor, dtype="float32", **_):
        pipe = pipeline("any-to-text", model=model, processor=processor, dtype=dtype, max_new_tokens=NEW_TOKENS)
        examples = [
            {"text": "<image> the", "images": image(1)},
            {"text": "<audio> is", "audio": sound(), "sampling_rate": SAMPLING_RATE},
            {"text": "<video> <speech> what", "videos": frames(2), "speech": (sound(), SAMPLING_RATE)},
            {"text": "what is the"},
        ]
        return pipe, examples

    def run_pipeline_test(self, pipe: Any, examples: list[Any]):
        speech = {"type": "speech", "speech": sound(), "sampling_rate": SAMPLING_RATE}
        chats = [
            user({"type": "image", "image": image()}, words("what is the")),
            user({"type": "video", "video": frames(2)}, speech, words("is the")),
            user(words("what")),
        ]
        for example in [*examples, *chats]:
            self.check_texts(pipe(example, return_full_text=False))
        self.check_texts([outputs[0] for outputs in pipe(chats, return_full_text=False, batch_size=3)])


class ImageTextToTextPipelineTests(_PipelineTests):
    def get_test_pipeline(self, model, tokenizer, processor, dtype="float32", **_):
        pipe = pipeline("image-text-to-text", model=model, processor=processor, dtype=dtype, max_new_tokens=NEW_TOKENS)
        return pipe, [{"text": "<image> what is the", "images": image()}, {"text": "<image> is", "images": image(1)}]

    def run_pipeline_test(self, pipe: Any, examples: list[Any]):
        for example in examples:
            self.check_texts(pipe(example))
        self.check_texts(pipe(images=[image(), image(1)], text=["<image> what", "the <image> is"]))
        chat = user({"type": "image", "image": image()}, words("what is the"))
        self.check_texts(pipe(text=chat, return_full_text=False))
        self.check_texts([outputs[0] for outputs in pipe(text=[chat, chat], return_full_text=False)])


class TextGenerationPipelineTests(_PipelineTests):
    def get_test_pipeline(self, model, tokenizer, processor=None, dtype="float32", **_):
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, dtype=dtype, max_new_tokens=NEW_TOKENS)
        return pipe, ["what is the", "is"]

    def run_pipeline_test(self, pipe: Any, examples: list[Any]):
        for example in examples:
            outputs = pipe(example)
            self.check_texts(outputs)
            self.assertTrue(outputs[0]["generated_text"].startswith(example))
        self.check_texts([outputs[0] for outputs in pipe(examples, return_full_text=False, num_return_sequences=1)])
        self.check_texts(pipe(examples[0], num_return_sequences=2, do_sample=True))


class FeatureExtractionPipelineTests(_PipelineTests):
    def get_test_pipeline(self, model, tokenizer, processor=None, dtype="float32", **_):
        pipe = pipeline("feature-extraction", model=model, tokenizer=tokenizer, dtype=dtype)
        return pipe, ["what is the", "is"]

    def run_pipeline_test(self, pipe: Any, examples: list[Any]):
        width = pipe.model.config.text_config.hidden_size
        for example in examples:
            length = len(pipe.tokenizer(example)["input_ids"])
            self.assertEqual(torch.tensor(pipe(example)).shape, (1, length, width))
