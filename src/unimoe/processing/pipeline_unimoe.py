"""`AnyToTextPipeline`: the task "any-to-text", text from any mix of texts, images, videos, audio and speech."""

import enum
import os
from collections.abc import Sized
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForMultimodalLM, BatchFeature, GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline, no_collate_fn
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .pipeline_batches import join_requests, split_answers

MEDIA_ARGUMENTS = ("images", "videos", "audio", "speech")
_SINGULAR = {"image": "images", "video": "videos"}
# Arguments of `generate` that no generation config has.
_GENERATE_ARGUMENTS = frozenset(
    {
        "generation_config",
        "streamer",
        "stopping_criteria",
        "logits_processor",
        "assistant_model",
        "prefix_allowed_tokens_fn",
    }
    | {name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "max_length"}
)
# What the pipeline asks of the chat template, since the model needs it so.
_TEMPLATE_OPTIONS = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": False}
# Arguments of `push_to_hub`. The size of a shard is one too, but goes to the model as well.
_HUB_ARGUMENTS = frozenset(
    {"repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"}
)


class ReturnType(enum.Enum):
    TENSORS = 0
    NEW_TEXT = 1
    FULL_TEXT = 2


class AnyToTextPipeline(Pipeline):
    """Generates text from any mix of text, images, videos, audio and speech, with chats or with plain prompts.

    Calls and results are those of Transformers' "image-text-to-text": a list of
    `{"input_text": ..., "generated_text": ...}`, one per returned sequence, for a single input; a list of such lists
    for a list of inputs. Unless the model's generation config says otherwise, at most 256 tokens are generated.

    ```python
    pipe = pipeline("any-to-text", model=folder)
    content = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is this?"}]
    pipe([{"role": "user", "content": content}])
    pipe(text="USER: <image>\\nWhat is this? ASSISTANT:", images="cat.png", return_full_text=False)
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    _pipeline_calls_generate = True
    # The number also stands in the docstring.
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def _sanitize_parameters(
        self,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        stop_sequence: str | list[str] | None = None,
        return_full_text: bool | None = None,
        return_tensors: bool | str | None = None,
        return_type: ReturnType | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # `timeout` is part of the signature of Transformers' pipelines; the loaders have their own.
        generate = dict(generate_kwargs or {})
        direct = {name: kwargs.pop(name) for name in _GENERATE_ARGUMENTS & kwargs.keys()}
        if max_new_tokens is not None:
            direct["max_new_tokens"] = max_new_tokens
        twice = sorted(generate.keys() & direct.keys())
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: given both in generate_kwargs and directly; use only one of the two."
            )
        generate.update(direct)
        if stop_sequence is not None:
            generate["stop_strings"] = [stop_sequence] if isinstance(stop_sequence, str) else list(stop_sequence)
            generate["tokenizer"] = self.processor.tokenizer
        _take_fixed(kwargs, _TEMPLATE_OPTIONS)
        if return_tensors not in (None, True, False, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: use True, which gives token ids as PyTorch tensors.")
        if return_full_text is not None and return_tensors:
            raise ValueError("return_full_text and return_tensors exclude each other.")
        if return_type is None and return_tensors:
            return_type = ReturnType.TENSORS
        if return_type is None and return_full_text is not None:
            return_type = ReturnType.FULL_TEXT if return_full_text else ReturnType.NEW_TEXT

        preprocess = dict(kwargs)
        postprocess: dict[str, Any] = {}
        if processor_kwargs is not None:
            preprocess["processor_kwargs"] = processor_kwargs = dict(processor_kwargs)
            _take_fixed(processor_kwargs, {"return_tensors": "pt"}, "processor_kwargs: ")
        if add_generation_prompt is not None:
            preprocess["add_generation_prompt"] = add_generation_prompt
            if add_generation_prompt and continue_final_message is None:
                # A new answer is asked for, also behind an assistant's message.
                continue_final_message = False
        if continue_final_message is not None:
            preprocess["continue_final_message"] = continue_final_message
            postprocess["continue_final_message"] = continue_final_message
        if return_type is not None:
            postprocess["return_type"] = return_type
        if skip_special_tokens is not None:
            postprocess["skip_special_tokens"] = skip_special_tokens
        if clean_up_tokenization_spaces is not None:
            postprocess["clean_up_tokenization_spaces"] = clean_up_tokenization_spaces
        return preprocess, {"generate_kwargs": generate} if generate else {}, postprocess

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        speech: Any = None,
        sampling_rate: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate.

        Args:
            text: a chat (a list of messages), a list of chats, a prompt with placeholders, a list of prompts, a dict
                `{"text": ..., "images": ...}` or a list of such, or a dataset or generator of any one of these.
            images, videos, audio, speech: the items of a prompt, or of several, as the processor takes them. A chat
                brings its own. `sampling_rate`: of sounds given as arrays, in Hz.
            max_new_tokens, generate_kwargs, streamer, stop_sequence: for `generate`; so is everything that a
                generation config knows.
            return_full_text: True (the default) gives the prompt with the answer behind it, or the whole chat with the
                answer as its last message; False only what is new.
            return_tensors: give `generated_token_ids` instead of a text.
            continue_final_message: go on with the last message of a chat; by default where that is an assistant's.
            add_generation_prompt: end a chat with what opens the answer; by default where no message is continued.
            batch_size: how many inputs of a list, dataset or generator go through the model at a time: 1 by default,
                for prompts with media all.
            processor_kwargs and others: for the processor.

        Returns:
            For one input a list of dicts, for prompts with media in one list too, otherwise a list (dataset,
            generator: an iterator) of lists of dicts.
        """
        media = {"images": images, "videos": videos, "audio": audio, "speech": speech}
        media = {name: items for name, items in media.items() if items is not None}
        if sampling_rate is not None:
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "sampling_rate": sampling_rate}
        if text is None:
            raise ValueError("text= is missing: give a chat or a prompt with one placeholder per item.")
        if isinstance(text, tuple):
            # To Transformers only a list is a list of inputs.
            text = list(text)
        if not media:
            return super().__call__(_as_chats(text), **kwargs)
        if not _is_prompt(text):
            raise ValueError(
                f"{', '.join(name + '=' for name in media)} go with a prompt (a string or a list of strings); "
                "a chat brings its items inside its messages."
            )
        if isinstance(text, str):
            return super().__call__({"text": text, **media}, **kwargs)
        requests = self.processor.split(text, media, sampling_rate)
        batch_size = kwargs.pop("batch_size", None) or self._batch_size or len(requests)
        outputs = super().__call__(requests, batch_size=batch_size, **kwargs)
        return [record for records in outputs for record in records]

    def preprocess(
        self,
        inputs: Any,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        processor_kwargs = {**(processor_kwargs or {})}
        if isinstance(inputs, dict) and not is_valid_message(inputs):
            request = {_SINGULAR.get(name, name): value for name, value in inputs.items() if value is not None}
            prompt = _as_chats(request.pop("text", None))
            unknown = sorted(set(request) - {*MEDIA_ARGUMENTS, "sampling_rate"})
            if unknown:
                known = ", ".join(map(repr, ("text", *MEDIA_ARGUMENTS, "sampling_rate")))
                raise ValueError(f"unknown key {', '.join(map(repr, unknown))}; known are {known}.")
            processor_kwargs.update(request)
        else:
            prompt = _as_chats(inputs)
        if isinstance(prompt, Chat):
            if continue_final_message is None:
                continue_final_message = prompt.messages[-1]["role"] == "assistant"
            if add_generation_prompt is None:
                add_generation_prompt = not continue_final_message
            features = self.processor.apply_chat_template(
                prompt.messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=processor_kwargs,
                **kwargs,
            )
        else:
            if add_generation_prompt is not None:
                raise ValueError(
                    "add_generation_prompt= goes with a chat (a list of messages); a prompt is used as it is given."
                )
            options = {"padding": True, "padding_side": "left", **kwargs, **processor_kwargs}
            features = self.processor(text=prompt, return_tensors="pt", **options)
        return {"features": features, "prompts": [list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]]}

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> PipelineIterator:
        # Transformers' own collation pads every input alike along its sequence and needs all inputs to have the same
        # kinds of media; `_collate` joins requests of any mix.
        if isinstance(inputs, Sized):
            dataset = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            num_workers = min(num_workers, 1)
            dataset = PipelineIterator(inputs, self.preprocess, preprocess_params)
        collate = no_collate_fn if batch_size == 1 else self._collate
        loader = DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=collate)
        outputs = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(outputs, self.postprocess, postprocess_params)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write a folder that `pipeline("any-to-text", model=folder)` loads again, without this package as remote code.

        Args:
            save_directory: the folder, made where it is missing.
            push_to_hub: upload the same too; `repo_id` (by default the folder's name), `token`, `private` and the other
                arguments of `push_to_hub` may go with it.
            kwargs: for the model's `save_pretrained`, such as `max_shard_size`.

        Raises:
            ValueError: `save_directory` is a file.
        """
        # Transformers' own would write the parts of the processor instead of it, and code only for a registered class.
        # Model and processor bring all code along, the processor that of this file.
        folder = os.path.abspath(save_directory)
        if os.path.isfile(folder):
            raise ValueError(f"save_directory={save_directory!r} is a file; give a folder.")
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS & kwargs.keys()}
        self.model.save_pretrained(folder, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        self.processor.save_pretrained(folder)
        if push_to_hub:
            size = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
            self.push_to_hub(hub.pop("repo_id", os.path.basename(folder)), **hub, **size)

    def _collate(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        return join_requests(requests, self.processor.tokenizer.pad_token_id)

    def _forward(self, model_inputs: dict[str, Any], generate_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        features = BatchFeature(dict(model_inputs["features"])).to(dtype=self.dtype)
        features.pop("mm_token_type_ids", None)
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs or {}, return_dict_in_generate=False)
        sequences = self.model.generate(**features, **generate_kwargs)
        # One entry per request: Transformers takes the outputs of a batch apart by their first dimension, and a request
        # of several texts has several rows.
        return {"answers": split_answers(model_inputs["prompts"], features["input_ids"], sequences)}

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_type: ReturnType = ReturnType.FULL_TEXT,
        continue_final_message: bool | None = None,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[dict[str, Any]]:
        answers = model_outputs["answers"]
        # Of a batch, the answers of one request come here; without one, they still are a list of a single entry.
        answers = answers[0] if isinstance(answers, list) else answers
        options = {"skip_special_tokens": skip_special_tokens}
        if clean_up_tokenization_spaces is not None:
            options["clean_up_tokenization_spaces"] = clean_up_tokenization_spaces
        records = []
        for prompt, input_ids, sequences in zip(answers["prompts"], answers["input_ids"], answers["sequences"]):
            for sequence in sequences:
                record = {"input_text": prompt.messages if isinstance(prompt, Chat) else prompt}
                if return_type == ReturnType.TENSORS:
                    record["generated_token_ids"] = sequence
                else:
                    new = self._new_text(input_ids, sequence, options)
                    record["generated_text"] = _answer(prompt, new, return_type, continue_final_message)
                records.append(record)
        return records

    def _new_text(self, input_ids: torch.Tensor, sequence: torch.Tensor, options: dict[str, Any]) -> str:
        # Decoded on its own, a SentencePiece text loses the space in front of it, which a continued sentence needs.
        tokenizer = self.processor.tokenizer
        before, whole = tokenizer.decode(input_ids, **options), tokenizer.decode(sequence, **options)
        if whole.startswith(before):
            return whole[len(before) :]
        return tokenizer.decode(sequence[len(input_ids) :], **options)


def _take_fixed(options: dict[str, Any], fixed: dict[str, Any], where: str = "") -> None:
    """Takes out of `options` what the pipeline itself passes on. Raises ValueError for a value other than its own."""
    for name, value in fixed.items():
        given = options.pop(name, None)
        if given is not None and given != value:
            raise ValueError(
                f"{where}{name}={given!r}: the pipeline needs {name}={value!r}, so leave it out; "
                "for other outputs of the processor call pipe.processor itself."
            )


def _answer(prompt: Any, new: str, return_type: ReturnType, continue_final_message: bool | None) -> Any:
    """What `generated_text` holds: the new text, the whole text, or the chat with the answer."""
    if not isinstance(prompt, Chat):
        return prompt + new if return_type == ReturnType.FULL_TEXT else new
    messages = list(prompt.messages)
    last = messages[-1]
    if continue_final_message is None:
        continue_final_message = last["role"] == "assistant"
    if not continue_final_message:
        # The space between "ASSISTANT:" and an answer is the template's, not the answer's.
        new = new.removeprefix(" ")
        return [*messages, {"role": "assistant", "content": new}] if return_type == ReturnType.FULL_TEXT else new
    if return_type == ReturnType.NEW_TEXT:
        return new
    content = last["content"]
    if isinstance(content, str):
        content += new
    else:
        # The template left off at the last text block, so that is the one that was continued.
        at = max(i for i, block in enumerate(content) if block.get("type") == "text")
        content = [*content[:at], {**content[at], "text": content[at]["text"] + new}, *content[at + 1 :]]
    return [*messages[:-1], {**last, "content": content}]


def _as_chats(inputs: Any) -> Any:
    """A list of messages as a Chat, a list of such as Chats; anything else as it is."""
    if isinstance(inputs, (list, tuple)) and inputs:
        if is_valid_message(inputs[0]):
            return Chat(inputs)
        if all(isinstance(one, (list, tuple)) and one and is_valid_message(one[0]) for one in inputs):
            return [Chat(one) for one in inputs]
    return inputs


def _is_prompt(text: Any) -> bool:
    return isinstance(text, str) or (isinstance(text, (list, tuple)) and all(isinstance(one, str) for one in text))


def register_task() -> None:
    """Makes `pipeline("any-to-text")` this one, in the place of another of that name, of which Transformers would warn."""
    PIPELINE_REGISTRY.supported_tasks.pop("any-to-text", None)
    PIPELINE_REGISTRY.register_pipeline(
        "any-to-text", pipeline_class=AnyToTextPipeline, pt_model=(AutoModelForMultimodalLM,), type="multimodal"
    )


if __name__.startswith("transformers_modules") and "any-to-text" not in PIPELINE_REGISTRY.get_supported_tasks():
    # Without the package, a folder's pipeline is found through its config, but one of a model at hand through its task.
    register_task()
