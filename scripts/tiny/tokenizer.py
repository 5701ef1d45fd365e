"""The tiny checkpoint's own tokenizer: byte-level BPE, so that every text has ids; the questions' words are pieces."""

from __future__ import annotations

from itertools import product

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .questions import TASKS, plural
from .sound_data import EVENTS
from .speech_data import WORDS
from .vision_data import COLOURS, SHAPES

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<audio>", "<speech>")
VOCAB_SIZE = 560


def corpus() -> list[str]:
    """The text that the model meets: turns of the chat with all phrasings, and all words of the answers."""
    shapes = [*SHAPES, *map(plural, SHAPES)]
    phrasings = [phrasing.format(shapes=shapes[-1]) for task in TASKS.values() for phrasing in task.phrasings]
    phrasings += [phrasing.capitalize() for phrasing in phrasings]
    names = (*COLOURS, *shapes, *EVENTS, *WORDS, "yes", "no", "high", "low", "moving", "still", "digit")
    turns = [f"USER: \n{phrasing} ASSISTANT:" for phrasing in phrasings]
    described = [f" {count} {colour} {shape}" for count, colour, shape in product(range(10), COLOURS, SHAPES)]
    # The trainer merges only pairs that occur at least twice, and every word shall become one piece.
    return [*turns, *described, *(f" {name}" for name in names), *(f" {name}," for name in names)] * 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """At most VOCAB_SIZE entries, the special ones first; adds <s> in front of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={f"{name}_token": f"<{name}>" for name in ("image", "video", "audio", "speech")},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
