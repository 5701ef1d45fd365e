"""Tokens that a folder adds to its `tokenizer.model`: the ids of its files, as Transformers reads them."""

import json

import pytest
import sentencepiece

from unimoe.conversion.errors import ConversionError
from unimoe.conversion.sentencepiece_tokenizer import load_llama_tokenizer

SIZE = 330
END, PAD = "<|end_of_turn|>", "<|pad_0|>"
TEXT = f"the USER: hi{END}the cat{PAD}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = "the USER: ASSISTANT: and the cat's 12345 image sound people describe".split()
    (folder / "corpus.txt").write_text("\n".join(" ".join(words[i:] + words[:i]) for i in range(len(words))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=SIZE,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    return (folder / "tokenizer.model").read_bytes()


def entry(content, special=True, **more):
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": special, **flags, **more}


@pytest.fixture
def write(model, tmp_path):
    """A function from ids by token (older list), tokens by id (newer list) and further settings to a folder."""

    def write(older=None, newer=None, special_map=None, **config):
        (tmp_path / "tokenizer.model").write_bytes(model)
        if older is not None:
            (tmp_path / "added_tokens.json").write_text(json.dumps(older))
        if special_map is not None:
            (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map))
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **config}
        if newer is not None:
            config["added_tokens_decoder"] = newer
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def size(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


def openchat(start, layout):
    """OpenChat's two tokens behind the vocabulary, in either list or both."""
    older, newer = {END: start, PAD: start + 1}, {str(start): entry(END), str(start + 1): entry(PAD)}
    return {"older": older if layout != "newer" else None, "newer": newer if layout != "older" else None}


@pytest.mark.parametrize("layout", ["older", "newer", "both"])
@pytest.mark.parametrize("named", [[], [END, PAD]])
def test_added_tokens_have_the_ids_of_their_files(model, write, layout, named, tmp_path):
    start = size(model)
    tokenizer = load_llama_tokenizer(write(**openchat(start, layout), additional_special_tokens=named))
    assert tokenizer.convert_ids_to_tokens([start, start + 1]) == [END, PAD] and len(tokenizer) == start + 2
    ids = tokenizer(TEXT)["input_ids"]
    assert ids.count(start) == 1 and ids[-1] == start + 1
    assert all(id < start for id in tokenizer("the USER: hi")["input_ids"])
    assert tokenizer.extra_special_tokens == named
    tokenizer.save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXT)["input_ids"] == ids
    # Transformers reads the original folder alike. (What it makes of the texts between is another matter.)
    original = AutoTokenizer.from_pretrained(tmp_path)
    assert original.convert_tokens_to_ids([END, PAD]) == [start, start + 1]
    assert [id for id in original(TEXT)["input_ids"] if id >= start] == [id for id in ids if id >= start]


@pytest.mark.parametrize("in_map", [True, False])
def test_named_tokens_keep_their_ids(model, write, in_map):
    """An end and a padding token from the list, whose order is not that in which special tokens are usually numbered."""
    start = size(model)
    named = {"pad_token": PAD, "eos_token": END}
    settings = {"special_map": named} if in_map else named
    tokenizer = load_llama_tokenizer(write({PAD: start, END: start + 1}, add_eos_token=True, **settings))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (start, start + 1)
    assert tokenizer("the cat")["input_ids"][-1] == start + 1
    assert tokenizer("the cat", padding="max_length", max_length=20)["input_ids"][-1] == start


def test_special_tokens_without_an_id_follow(model, write):
    start = size(model)
    tokenizer = load_llama_tokenizer(
        write({END: start}, pad_token="[PAD]", additional_special_tokens=["<more>", END, "</s>"])
    )
    assert tokenizer.convert_tokens_to_ids([END, "[PAD]", "<more>", "</s>"]) == [start, start + 1, start + 2, 2]


def test_ordinary_added_tokens_stay_in_the_text(model, write):
    start = size(model)
    tokenizer = load_llama_tokenizer(
        write(newer={str(start): entry("<word>", special=False)}, older={"<word>": start})
    )
    ids = tokenizer("the <word> cat")["input_ids"]
    assert start in ids and "<word>" in tokenizer.decode(ids, skip_special_tokens=True)


def test_spaces_beside_a_token_are_taken_as_its_entry_says(model, write):
    start = size(model)
    tokenizer = load_llama_tokenizer(write(newer={str(start): entry(END, rstrip=True)}))
    assert tokenizer(f"the{END}   cat")["input_ids"] == tokenizer(f"the{END}cat")["input_ids"]


def test_ids_left_out_are_free_rows_of_the_embedding(model, write):
    start = size(model)
    folder = write({END: start + 3})
    tokenizer = load_llama_tokenizer(folder, num_rows=start + 4)
    assert tokenizer.convert_tokens_to_ids(END) == start + 3
    assert tokenizer.convert_ids_to_tokens(start + 1) == f"<|unused_{start + 1}|>"
    with pytest.raises(ConversionError, match=rf"has the id {start + 3}, but no token the id {start}; .* incomplete"):
        load_llama_tokenizer(folder, num_rows=start)


@pytest.mark.parametrize(
    "older, newer, message",
    [
        ({END: 0}, {"1": END}, r"tokenizer_config\.json: .* has the id SIZE\+1, but .* it has the id SIZE;"),
        ({END: 0}, {"0": PAD}, r"tokenizer_config\.json: .* has the id SIZE, but .*'<\|end_of_turn\|>' has that id"),
        ({END: 0, PAD: 0}, None, r"added_tokens\.json: .* has the id SIZE, but .* has that id"),
        ({END: -5}, None, r"added_tokens\.json: .* but by tokenizer\.model or another file there .* has that id"),
        ({"</s>": 0}, None, r"added_tokens\.json: '</s>' has the id SIZE, but .* it has the id 2;"),
        ({END: 1_000_000_000}, None, r"no token the id SIZE"),
    ],
)
def test_contradictions_are_refused(model, write, older, newer, message):
    """Ids count from the end of the model."""
    start = size(model)
    older = {token: index + start for token, index in older.items()}
    newer = newer and {str(int(index) + start): entry(token) for index, token in newer.items()}
    message = message.replace(r"SIZE\+1", str(start + 1)).replace("SIZE", str(start))
    with pytest.raises(ConversionError, match=message):
        load_llama_tokenizer(write(older, newer), num_rows=start)


@pytest.mark.parametrize(
    "older, config, message",
    [
        ({END: "x"}, {}, r"added_tokens\.json: .* has the id 'x'"),
        ({END: None}, {}, r"added_tokens\.json: .* has the id None"),
        ([END], {}, r"added_tokens\.json: a JSON object is needed"),
        (None, {"newer": [END]}, r"tokenizer_config\.json: added_tokens_decoder=.*a JSON object is needed"),
        (None, {"newer": {"x": entry(END)}}, r"tokenizer_config\.json: added_tokens_decoder\.x is not a token"),
        (None, {"newer": {"330": END}}, r"tokenizer_config\.json: added_tokens_decoder\.330 is not a token"),
        (None, {"newer": {"330": entry(5)}}, r"tokenizer_config\.json: added_tokens_decoder\.330 is not a token"),
        (None, {"eos_token": 5}, r"tokenizer_config\.json: eos_token=5; a text"),
        (None, {"bos_token": [1]}, r"tokenizer_config\.json: bos_token=\[1\]; a text"),
        (None, {"special_map": {"pad_token": {}}}, r"special_tokens_map\.json: pad_token=\{\}; a text"),
        (None, {"additional_special_tokens": [1]}, r"tokenizer_config\.json: additional_special_tokens=\[1\]"),
        (None, {"padding_side": "top"}, r"tokenizer_config\.json: padding_side='top'; 'left' or 'right'"),
        (None, {"model_max_length": "x"}, r"tokenizer_config\.json: model_max_length='x'; a number"),
    ],
)
def test_damaged_settings_are_named(write, older, config, message):
    with pytest.raises(ConversionError, match=message):
        load_llama_tokenizer(write(older, **config))


def test_a_piece_that_occurs_twice_is_refused(model, tmp_path):
    """Its ids would not be those of the file."""
    from sentencepiece import sentencepiece_model_pb2

    damaged = sentencepiece_model_pb2.ModelProto.FromString(model)
    damaged.pieces[300].piece = damaged.pieces[299].piece
    (tmp_path / "tokenizer.model").write_bytes(damaged.SerializeToString())
    with pytest.raises(ConversionError, match=r"tokenizer\.model: a piece occurs twice"):
        load_llama_tokenizer(tmp_path)
