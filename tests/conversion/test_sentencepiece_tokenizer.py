"""The fast tokenizer against SentencePiece, used as the slow tokenizer of Transformers 4.31 used it."""

import json
import random
import re
import shutil

import pytest
import sentencepiece
from uni_moe_sets import find_set

from unimoe.conversion.errors import ConversionError
from unimoe.conversion.sentencepiece_tokenizer import load_llama_tokenizer
from unimoe.processing.prompting import Piece, tokenize_pieces

WORDS = "the USER: ASSISTANT: cat's 12345 image,  sound? people. Zürich 你好 😀 x\ty a_b <0x0A> \n\n describe".split(
    " "
)
FIXED = [
    "",
    " ",
    "  leading",
    "trailing  ",
    " x",
    "  two  spaces\n\n",
    "\nWhat",
    "</s>USER: hi",
    "</s> x",
    " </s>  y",
    "▁x",
    "a</s>你好",
    "a</s>▁x",
    "<unk>▁▁ the",
    "<s>USER",
]


def slow_ids(model, text, legacy):
    """`LlamaTokenizer(use_fast=False)` of Transformers 4.31, in terms of SentencePiece."""
    ids = [model.bos_id()]
    if not legacy:
        text = "▁" + text.replace("▁", " ")
    for segment in re.split(r"(<s>|</s>|<unk>)", text):
        if segment in ("<s>", "</s>", "<unk>"):
            ids.append(model.piece_to_id(segment))
            continue
        begins = not legacy and segment.startswith("▁")
        segment = segment[1:] if begins else segment
        pieces = model.encode(segment, out_type=str)
        if not legacy and not begins and not segment.startswith(" ") and pieces and pieces[0].startswith("▁"):
            pieces = ([pieces[0][1:]] if len(pieces[0]) > 1 else []) + pieces[1:]
        ids += [model.piece_to_id(piece) for piece in pieces]
    return ids


@pytest.fixture(scope="module", params=["trained here", "unimoe_audio", "unimoe_speech", "unimoe_8e"])
def folder(request, tmp_path_factory):
    """A folder with `tokenizer.model`: of a recorded set, or trained on a few words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "trained here":
        (folder / "corpus.txt").write_text(
            "\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))) + "\nthe USER and the cat\n" * 20
        )
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=330,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        )  # fmt: skip
    elif (found := find_set(request.param)) is None:
        pytest.skip("the set is not there")
    else:
        source = next(path.parent for path in sorted(found.glob("checkpoint/*/tokenizer.model")))
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("legacy", [True, False, None])
def test_ids_are_those_of_the_slow_tokenizer(folder, legacy, tmp_path):
    shutil.copyfile(folder / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({} if legacy is None else {"legacy": legacy}))
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokenizer = load_llama_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    rng = random.Random(0)
    texts = list(FIXED)
    for _ in range(300):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        texts += [
            text,
            " " * rng.randint(1, 3) + text,
            f"{text}</s>USER: {text}",
            f"{text}</s> {text}",
            f"{text}</s>{text}",
        ]
    for text in texts:
        [segment] = tokenize_pieces(tokenizer, [Piece(None, text, 0)])
        assert segment.ids == slow_ids(model, text, legacy is not False), repr(text)
        if legacy is not False or "s>" not in text:
            assert tokenizer(text)["input_ids"] == segment.ids, repr(text)


def test_special_tokens_and_settings(folder, tmp_path):
    shutil.copyfile(folder / "tokenizer.model", tmp_path / "tokenizer.model")
    config = {"bos_token": {"content": "<s>"}, "padding_side": "right", "model_max_length": 123, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_llama_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 123)
    text = "the cat's  12345 你好 😀\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_damaged_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ConversionError, match="tokenizer.model"):
        load_llama_tokenizer(tmp_path)
