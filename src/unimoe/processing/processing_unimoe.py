"""`UniMoEProcessor`: texts with placeholders and their media to what the model takes."""

import sys
from typing import Any

from tokenizers import AddedToken
from transformers import AutoImageProcessor, BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import logging
from transformers.utils.chat_template_utils import _get_template_variables, render_jinja_template

from .call_options import CALL_OPTIONS, CallOptions
from .chat_template import DEFAULT_CHAT_TEMPLATE
from .conversation import is_batch, read_blocks
from .feature_extraction_unimoe import UniMoEFeatureExtractor
from .media import check_media, load_audio, load_image, load_video
from .media_features import image_pixels, on_pil_backend, video_pixels
from .media_inputs import ARGUMENTS, SOUNDS, PerText, Slot, assign_items, count_items, flat_items, gather_items

# Not used here. A processor that was loaded as remote code is saved with the files that this one imports; without this
# line the pipeline that the model's config names would be left behind.
from .pipeline_unimoe import AnyToTextPipeline  # noqa: F401
from .prompting import (
    EncodedConversation,
    Piece,
    Segment,
    check_texts,
    expand_segments,
    media_spans,
    pad_rows,
    split_prompt,
    tokenize_pieces,
    truncate_row,
)

logger = logging.get_logger(__name__)


class _PresentSubProcessors:
    """`get_attributes` of ProcessorMixin, without the sub-processors that an instance lacks.

    ProcessorMixin takes every sub-processor of its signature for present when it saves or prints an instance; a model
    without vision or without sound has none of that kind.
    """

    def __get__(self, instance: "UniMoEProcessor | None", owner: type) -> Any:
        names = ["image_processor", "tokenizer", "feature_extractor"]
        if instance is None:
            return lambda: list(names)
        return lambda: [name for name in names if instance.__dict__.get(name, ...) is not None]


class UniMoEProcessor(ProcessorMixin):
    """Turns prompts with media into the inputs of a UniMoE model, the way the original systems do.

    A text holds one literal placeholder per item (`<image>`, `<video>`, `<audio>`, `<speech>`), which becomes as many
    tokens as the model has features for it. Text between placeholders is tokenised chunk by chunk, as in the
    originals.

    Args:
        image_processor: for images and frames; None for a model without vision. Always the PIL backend, since only
            that reproduces the originals' pixels bit by bit; another backend of the same type is exchanged for it.
        tokenizer: missing placeholder tokens of the model's towers are added to it as special tokens. Their ids may
            lie beyond the model's embedding.
        feature_extractor: a `UniMoEFeatureExtractor`; None for a model without sound.
        num_image_tokens: tokens per image; None or 0: the model takes no images. Likewise
        num_video_tokens: tokens per video (the same as per image: frames are averaged),
        num_audio_tokens: tokens per chunk for the BEATs tower,
        num_speech_tokens: tokens per chunk for the Whisper tower.
        num_video_frames: frames read from a video file.
        image_aspect_ratio: "square" hands images over as they are; "pad" first pastes them centred on a square canvas
            in the mean colour.
        image_token, video_token, audio_token, speech_token: the literal placeholders.
        max_length: the model's context in tokens; a longer prompt is refused. None: unlimited.
        chat_template: Jinja text, or a dict of several; None for that of Uni-MoE.
    """

    get_attributes = _PresentSubProcessors()

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        num_image_tokens: int | None = None,
        num_video_tokens: int | None = None,
        num_audio_tokens: int | None = None,
        num_speech_tokens: int | None = None,
        num_video_frames: int = 8,
        image_aspect_ratio: str = "square",
        image_token: str = "<image>",
        video_token: str = "<video>",
        audio_token: str = "<audio>",
        speech_token: str = "<speech>",
        max_length: int | None = None,
        chat_template: str | dict[str, str] | None = None,
    ):
        if image_aspect_ratio not in ("square", "pad"):
            raise ValueError(f"image_aspect_ratio={image_aspect_ratio!r} is unknown; it is 'square' or 'pad'.")
        self.num_image_tokens = num_image_tokens
        self.num_video_tokens = num_video_tokens
        self.num_audio_tokens = num_audio_tokens
        self.num_speech_tokens = num_speech_tokens
        self.num_video_frames = num_video_frames
        self.image_aspect_ratio = image_aspect_ratio
        self.image_token = image_token
        self.video_token = video_token
        self.audio_token = audio_token
        self.speech_token = speech_token
        self.max_length = max_length
        # Saving would add it, and a processor would then differ from what it was before.
        self.auto_map = {"AutoProcessor": "processing_unimoe.UniMoEProcessor"}
        super().__init__(
            image_processor=on_pil_backend(image_processor),
            tokenizer=tokenizer,
            feature_extractor=feature_extractor,
            chat_template=DEFAULT_CHAT_TEMPLATE if chat_template is None else chat_template,
        )
        for kind in self.towers:
            needed = "feature_extractor" if kind in SOUNDS else "image_processor"
            if getattr(self, needed) is None:
                raise ValueError(
                    f"num_{kind}_tokens={self.num_tokens(kind)} needs the {needed}, which is None; pass it too."
                )
        vocabulary = tokenizer.get_vocab()
        missing = [
            token for kind, token in self.placeholders.items() if kind in self.towers and token not in vocabulary
        ]
        if missing:
            tokens = [AddedToken(token, special=True, normalized=False) for token in missing]
            tokenizer.add_tokens(tokens, special_tokens=True)
        for kind, token in self.placeholders.items():
            setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token) if kind in self.towers else None)

    @property
    def placeholders(self) -> dict[str, str]:
        """The literal placeholder of each kind of medium, also of those that the model does not take."""
        return {kind: getattr(self, f"{kind}_token") for kind in ARGUMENTS}

    @property
    def towers(self) -> tuple[str, ...]:
        """The kinds of media that the model takes."""
        return tuple(kind for kind in ARGUMENTS if self.num_tokens(kind))

    def num_tokens(self, kind: str) -> int:
        """Tokens per image, per video, per audio chunk or per speech chunk; 0 where the model takes none."""
        return getattr(self, f"num_{kind}_tokens") or 0

    @property
    def model_input_names(self) -> list[str]:
        names = {
            "image": ["pixel_values"],
            "video": ["pixel_values_videos", "video_frame_mask"],
            "audio": ["input_values", "input_values_mask"],
            "speech": ["input_features"],
        }
        return ["input_ids", "attention_mask", *(name for kind in self.towers for name in names[kind])]

    def __call__(
        self,
        text: str | list[str] | None = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        speech: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare texts and their media.

        Args:
            text: one prompt or several, with one placeholder per item. Without it only the media are prepared.
            images, videos, audio, speech: one item, a flat list (used up in order over the texts) or one list per text
                (then each text's count is checked). An item is a path, URL, bytes, base64 or data URI, PIL image,
                array or tensor. A video is a file, a folder of frames, an array [frames, ...], or a list of its
                frames: images, arrays or image files. So a list of video files (also GIFs and animated WebPs) is several
                videos, a list of images is one. A model with one sound tower takes `audio` and `speech` alike.
            kwargs: as follows.
            sampling_rate: of the sounds given as arrays, in Hz. Files know theirs.
            num_frames: frames to read from a video file, instead of `num_video_frames`; with `do_sample_frames=False`
                all of them.
            padding: True or "longest", "max_length", or False. Its side is `padding_side` or the tokenizer's.
            truncation: cut a prompt behind `max_length` (or the processor's) tokens instead of refusing it, which must
                not cut away a medium.
            add_special_tokens: False leaves out the tokenizer's BOS.
            return_mm_token_type_ids: add `mm_token_type_ids`: 0 text, 1 image, 2 video, 3 sound.
            return_tensors: "pt", "np", or None for lists of ids and arrays of features.
            do_resize, size, resample, do_center_crop, crop_size, do_rescale, rescale_factor, do_normalize, image_mean,
                image_std, do_convert_rgb: instead of the image processor's own, for images and frames.

        Returns:
            BatchFeature with `input_ids` and `attention_mask` [B, S] and, where there are such items, in the order of
            the placeholders: `pixel_values` float32 [N, 3, R, R], `pixel_values_videos` float32 [N, F, 3, R, R] (with
            `video_frame_mask` int64 [N, F] only where videos differ in length), `input_values` float32 [chunks,
            frames, 128] with `input_values_mask` int64 [chunks, frames], `input_features` float32 [chunks, 80, 3000].

        Raises:
            ValueError, TypeError: before anything is decoded, for counts that do not match, a kind of medium that the
                model does not take, an array without a sampling rate, an empty text, an item of an unknown type;
                afterwards for an unreadable file and a prompt that is too long.
        """
        media = {"image": images, "video": videos, "audio": audio, "speech": speech}
        return self._prepare(text, media, CallOptions.read(kwargs, self.tokenizer.init_kwargs))

    def _prepare(
        self,
        text: str | list[str] | None,
        media: dict[str, Any],
        options: CallOptions,
        answer_spans: list[list[tuple[int, int]]] | None = None,
    ) -> BatchFeature:
        """`__call__` with its arguments gathered; with `answer_spans` also returns `assistant_masks`."""
        if text is None:
            slots_of_texts = [[slot for kind in ARGUMENTS for slot in flat_items(kind, media[kind])]]
            if not slots_of_texts[0]:
                raise ValueError("nothing to prepare: give text=, and with it images=, videos=, audio= or speech=.")
            prompts = []
        else:
            texts = check_texts(text)
            pieces = [split_prompt(text, self.placeholders) for text in texts]
            slots_of_texts = self._assign(pieces, media)
            prompts = [tokenize_pieces(self.tokenizer, row, options.add_special_tokens) for row in pieces]
        self._check_items(slots_of_texts, options.sampling_rate)
        limits = (self.max_length, options.max_length if options.truncates else None)
        limit = min((limit for limit in limits if limit), default=None)
        if not options.truncates:
            # A sound has at least one chunk, so that much is known before any file is decoded.
            self._check_lengths(prompts, slots_of_texts, [[1] * len(slots) for slots in slots_of_texts], limit)
        features, chunks_of_texts = self._prepare_media(slots_of_texts, options)
        if text is None:
            return BatchFeature(features, tensor_type=options.return_tensors)
        if not options.truncates:
            self._check_lengths(prompts, slots_of_texts, chunks_of_texts, limit)
        rows = []
        for i, (prompt, slots, chunks) in enumerate(zip(prompts, slots_of_texts, chunks_of_texts)):
            towers, lengths = self._towers_and_lengths(slots, chunks)
            row = expand_segments(
                prompt,
                lengths,
                [self._token_id(tower) for tower in towers],
                answer_spans[i] if answer_spans is not None else None,
            )
            rows.append(truncate_row(row, limit, f"text[{i}]") if options.truncates and limit else row)
        columns = pad_rows(
            rows,
            options.padding_mode,
            self.tokenizer.pad_token_id,
            options.padding_side or self.tokenizer.padding_side,
            options.max_length or self.max_length,
            options.pad_to_multiple_of,
        )
        if not options.return_mm_token_type_ids:
            del columns["mm_token_type_ids"]
        if options.return_tensors is not None and len({len(row) for row in columns["input_ids"]}) > 1:
            raise ValueError("the texts have different lengths; pass padding=True to get tensors of them.")
        return BatchFeature({**columns, **features}, tensor_type=options.return_tensors)

    def encode_conversation(self, messages: list[dict[str, Any]], media: dict[str, list[Any]]) -> EncodedConversation:
        """One conversation for training: of any length, with its answers marked and its media located.

        Args:
            messages: as `apply_chat_template` takes them, their media blocks without items.
            media: the items of each kind, in the order of their blocks.

        Raises:
            ValueError: items and placeholders do not match, or an item cannot be decoded.
        """
        texts, answer_spans = render_jinja_template(
            conversations=[messages],
            chat_template=self._resolve_chat_template(None),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        pieces = split_prompt(texts[0], self.placeholders)
        items = {kind: [PerText(media[kind])] if media.get(kind) else None for kind in ARGUMENTS}
        slots_of_texts = self._assign([pieces], items)
        segments = tokenize_pieces(self.tokenizer, pieces)
        features, (chunks,) = self._prepare_media(slots_of_texts, CallOptions())
        towers, lengths = self._towers_and_lengths(slots_of_texts[0], chunks)
        row = expand_segments(segments, lengths, [self._token_id(tower) for tower in towers], answer_spans[0])
        spans = media_spans(segments, lengths)
        return EncodedConversation(row, [(tower, *span) for tower, span in zip(towers, spans)], features)

    def _towers_and_lengths(self, slots: list[Slot], chunks: list[int]) -> tuple[list[str], list[int]]:
        """The tower that takes each item, and the tokens that it becomes."""
        towers = [self._tower(slot.kind) for slot in slots]
        return towers, [self.num_tokens(tower) * count for tower, count in zip(towers, chunks)]

    def _token_id(self, tower: str) -> int:
        return getattr(self, f"{tower}_token_id")

    def split(self, text: list[str], media: dict[str, Any], sampling_rate: int | None = None) -> list[dict[str, Any]]:
        """The arguments of one call for each text, out of those for all of them.

        Checks everything that `__call__` checks before it decodes. `media` has the names of `__call__`'s arguments.
        """
        texts = check_texts(text)
        pieces = [split_prompt(text, self.placeholders) for text in texts]
        slots_of_texts = self._assign(pieces, {kind: media.get(argument) for kind, argument in ARGUMENTS.items()})
        self._check_items(slots_of_texts, sampling_rate)
        calls = []
        for text, slots in zip(texts, slots_of_texts):
            call: dict[str, Any] = {"text": text}
            for slot in slots:
                call.setdefault(ARGUMENTS[slot.kind], PerText()).append(slot.item)
            calls.append({name: [value] if isinstance(value, PerText) else value for name, value in call.items()})
        return calls

    def _assign(self, pieces: list[list[Piece]], media: dict[str, Any]) -> list[list[Slot]]:
        kinds = [[piece.kind for piece in row if piece.kind is not None] for row in pieces]
        self._check_towers(kinds, media)
        return assign_items(kinds, media, self.placeholders, self._sounds_alike)

    @property
    def _sounds_alike(self) -> bool:
        return len(set(self.towers) & set(SOUNDS)) == 1

    def _tower(self, kind: str) -> str:
        """The tower that takes a kind of medium."""
        return next(name for name in self.towers if name in SOUNDS) if kind in SOUNDS and self._sounds_alike else kind

    def _check_towers(self, kinds_of_texts: list[list[str]], media: dict[str, Any]) -> None:
        for kind, argument in ARGUMENTS.items():
            taken = kind in self.towers or (kind in SOUNDS and self._sounds_alike)
            texts = [i for i, kinds in enumerate(kinds_of_texts) if kind in kinds]
            given = bool(count_items(media[kind]))
            if taken or not (texts or given):
                continue
            what = f"text[{texts[0]}] holds {self.placeholders[kind]}" if texts else f"{argument}= was passed"
            raise ValueError(f"{what}, but this model takes no {kind}; it takes {', '.join(('text', *self.towers))}.")

    def _check_items(self, slots_of_texts: list[list[Slot]], sampling_rate: int | None) -> None:
        for slot in (slot for slots in slots_of_texts for slot in slots):
            check_media(slot.item, slot.kind, slot.name, sampling_rate)

    def _prepare_media(
        self, slots_of_texts: list[list[Slot]], options: CallOptions
    ) -> tuple[dict[str, Any], list[list[int]]]:
        """Decode everything; returns the model's inputs and for each slot how many times its tokens are repeated."""
        slots = [slot for row in slots_of_texts for slot in row]
        by_tower: dict[str, list[int]] = {}
        for i, slot in enumerate(slots):
            by_tower.setdefault(self._tower(slot.kind), []).append(i)
        pad = self.image_aspect_ratio == "pad"
        features: dict[str, Any] = {}
        repeats = [1] * len(slots)
        for tower, indices in by_tower.items():
            chosen = [slots[i] for i in indices]
            if tower == "image":
                images = [load_image(slot.item, slot.name) for slot in chosen]
                features["pixel_values"] = image_pixels(self.image_processor, images, pad, options.image_options)
            elif tower == "video":
                # A video gives all it has where it has fewer frames.
                num_frames = self.num_video_frames if options.num_frames is None else options.num_frames
                num_frames = num_frames if options.do_sample_frames else sys.maxsize
                videos = [load_video(slot.item, num_frames, slot.name) for slot in chosen]
                features.update(video_pixels(self.image_processor, videos, pad, options.image_options))
            else:
                extracted = self._sounds(tower, chosen, options.sampling_rate)
                for i, count in zip(indices, extracted.pop("num_chunks")):
                    repeats[i] = int(count)
                features.update(extracted)
        counts = iter(repeats)
        return features, [[next(counts) for _ in row] for row in slots_of_texts]

    def _sounds(self, tower: str, slots: list[Slot], sampling_rate: int | None) -> dict[str, Any]:
        target = self.feature_extractor.sampling_rate
        waveforms = [load_audio(slot.item, sampling_rate, target, slot.name) for slot in slots]
        extract = self.feature_extractor.extract_audio if tower == "audio" else self.feature_extractor.extract_speech
        return extract(waveforms)

    def _check_lengths(
        self,
        prompts: list[list[Segment]],
        slots_of_texts: list[list[Slot]],
        repeats: list[list[int]],
        limit: int | None,
    ) -> None:
        for i, (prompt, slots, counts) in enumerate(zip(prompts, slots_of_texts, repeats)):
            taken = {"text": sum(len(segment.ids) for segment in prompt)}
            for slot, count in zip(slots, counts):
                taken[slot.kind] = taken.get(slot.kind, 0) + self.num_tokens(self._tower(slot.kind)) * count
            total = sum(taken.values())
            if limit is not None and total > limit:
                raise ValueError(
                    f"text[{i}] takes {total} tokens, {total - limit} more than the {limit} that the model can read "
                    f"({', '.join(f'{kind}: {count}' for kind, count in taken.items())}); shorten it or pass less."
                )

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        load_audio_from_video: bool = False,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render one conversation or a list of them and, with `tokenize`, prepare text and media for the model.

        Args:
            conversation: messages of `{"role": ..., "content": ...}`; a content is a string or a list of blocks of
                type "text", "image", "video", "audio", "speech". A medium stands under its own type's name, "path",
                "url" or "base64"; a sound given as an array needs a "sampling_rate" beside it (or `sampling_rate=`),
                which does not count for files.
            chat_template: a Jinja text, or the name of one of the processor's, instead of the default one.
            add_generation_prompt: end with what opens the answer.
            continue_final_message: leave the last message open, for the model to go on with it.
            return_assistant_tokens_mask: add `assistant_masks`: 1 for the tokens of the answers.
            tokenize: False returns the rendered text; True calls the processor with it and with the media.
            return_dict: False returns only `input_ids`.
            processor_kwargs: arguments of `__call__`; they may also be given directly. Items passed here fill the
                blocks that give none, where none of that kind does.
            load_audio_from_video: ignored, with a warning; a sound track is an item of its own.
            tools, documents, kwargs: variables of the template.

        Raises:
            ValueError, TypeError: for malformed messages, for a text that holds a placeholder, for a block without an
                item where none is passed either, for an argument that
                the template does not use, and what `__call__` raises.
        """
        if load_audio_from_video:
            logger.warning_once("load_audio_from_video is ignored: give a video's sound as a block of its own.")
        batched = is_batch(conversation)
        conversations, blocks = [], {kind: [] for kind in ARGUMENTS}
        for i, one in enumerate(conversation if batched else [conversation]):
            messages, found = read_blocks(one, self.placeholders, f"conversation[{i}]" if batched else "conversation")
            conversations.append(messages)
            for kind, blocks_of_kind in found.items():
                blocks[kind].append(blocks_of_kind)
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other; pass one of them.")
        direct = {name: kwargs.pop(name) for name in {*CALL_OPTIONS, *ARGUMENTS.values()} & kwargs.keys()}
        options = {"return_tensors": return_tensors, **(processor_kwargs or {}), **direct}
        template = self._resolve_chat_template(chat_template)
        unknown = {name for name, value in kwargs.items() if value is not None} - _get_template_variables(template)
        if unknown:
            raise TypeError(f"unknown argument {', '.join(sorted(unknown))}: neither an option nor in the template.")
        texts, answer_spans = render_jinja_template(
            conversations=conversations,
            tools=tools,
            documents=documents,
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        if not tokenize:
            return texts if batched else texts[0]
        passed = {kind: options.pop(name, None) for kind, name in ARGUMENTS.items()}
        media = gather_items(blocks, passed, self._sounds_alike)
        read = CallOptions.read(options, self.tokenizer.init_kwargs)
        outputs = self._prepare(texts, media, read, answer_spans if return_assistant_tokens_mask else None)
        return outputs if return_dict else outputs["input_ids"]

    def _get_num_multimodal_tokens(self, image_sizes: list[Any] | None = None, **kwargs: Any) -> MultiModalData:
        """How many tokens images take; serving engines ask this before they have the images themselves."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_tokens("image")] * count, num_image_patches=[1] * count)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument is None and argument_name != "tokenizer":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Load the sub-processors that `processor_config.json` names; ProcessorMixin wants all of them."""
        processor_dict = processor_dict or {}
        folder = pretrained_model_name_or_path
        image_processor = feature_extractor = None
        if processor_dict.get("image_processor") is not None:
            image_processor = AutoImageProcessor.from_pretrained(folder, **{**kwargs, "backend": "pil"})
        if processor_dict.get("feature_extractor") is not None:
            feature_extractor = UniMoEFeatureExtractor.from_dict(processor_dict["feature_extractor"])
        subfolder = kwargs.pop("subfolder", "")
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", folder, subfolder=subfolder, **kwargs)
        return [image_processor, tokenizer, feature_extractor]
