"""Labels: the masks that the originals recorded, answers and nothing else, and cutting at the context."""

import json

import pytest
from safetensors.torch import load_file
from tiny_processor import AUDIO_CHUNK, NUM_TOKENS, SPEECH_CHUNK
from training_records import turn
from transformers import CLIPImageProcessorPil, LlamaTokenizer

from unimoe.processing.feature_extraction_unimoe import UniMoEFeatureExtractor
from unimoe.processing.processing_unimoe import UniMoEProcessor
from unimoe.training.labels import IGNORED, check_processor, encode
from unimoe.training.records import DataError, read_records

BASES = {
    "cases": "Uni-MoE-audio-base",
    "cases_e2": "Uni-MoE-speech-base",
    "cases_v1.5": "Uni-MoE-speech-base-interval",
}
SETS = [("unimoe_audio", "cases"), ("unimoe_speech", "cases_e2"), ("unimoe_speech", "cases_v1.5")]


def write(path, records):
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(params=SETS, ids=[cases for _, cases in SETS])
def recorded(request, golden, tmp_path):
    """Each recorded training row: its ids and labels, and what `encode` makes of its sample."""
    name, cases = request.param
    root = golden(name)
    checkpoint = root / "checkpoint"
    processor = UniMoEProcessor(
        CLIPImageProcessorPil.from_pretrained(checkpoint / "clip-vit-large-patch14-336"),
        LlamaTokenizer.from_pretrained(checkpoint / BASES[cases]),
        UniMoEFeatureExtractor(audio_chunk_samples=AUDIO_CHUNK, speech_chunk_samples=SPEECH_CHUNK, audio_max_chunks=1),
        num_image_tokens=1,
        num_video_tokens=1,
        **{f"num_{'audio' if name == 'unimoe_audio' else 'speech'}_tokens": 1},
    )
    tensors = load_file(root / f"{cases}.safetensors")
    content = json.loads((root / f"{cases}.json").read_text())
    if name == "unimoe_audio":
        batches = {case: content[case]["samples"] for case in ("train_batch2", "train_batch3")}
    else:
        samples = {s["id"]: s for s in json.loads((root / "inputs" / "train_samples.json").read_text())}
        chosen = {"batch_image2speech_and_text": "ab", "batch_video_speech": "c", "batch_video_only_bug": "d"}
        batches = {case: [samples[i] for i in ids] for case, ids in chosen.items()}
    rows = []
    for case, samples in batches.items():
        records = read_records(write(tmp_path / f"{case}.json", samples), processor, media_root=root)
        for i, record in enumerate(records):
            ids, labels = tensors[f"{case}.input_ids"][i], tensors[f"{case}.labels"][i]
            rows.append((case, record, ids.tolist(), labels.tolist()))
    return processor, rows


def test_recorded_masks(recorded):
    processor, rows = recorded
    ignored_by_originals = 0
    for case, record, ids, labels in rows:
        inputs = encode(processor, record).inputs
        found = inputs["labels"].tolist()
        if case == "batch_video_only_bug":
            # The original read the literal text "<video>"; the answer's labels are the same all the same.
            assert [i for i in found if i != IGNORED] == [i for i in labels if i != IGNORED]
            continue
        if all(label == IGNORED for label in labels):
            # The original's counting failed at two turns, see `encode`. Ours has both answers with their ends.
            ignored_by_originals += 1
            assert found.count(processor.tokenizer.eos_token_id) == 2
            continue
        # Here each sound is one chunk, so a placeholder is one token on both sides; behind the row comes padding.
        end = len(found)
        text = [i for i, token in enumerate(ids) if token >= 0][:end]
        assert [inputs["input_ids"][i].item() for i in text if i < end] == [ids[i] for i in text if i < end]
        assert found == labels[:end] and all(label == IGNORED for label in labels[end:])
    assert ignored_by_originals == (0 if case.startswith("train") else 1)


def test_labels_are_the_answers_and_their_ends(processor, data_file):
    answers = [["a cat"], ["the end"], ["a bell"], ["hello"], ["is what", "no"], ["what"], ["all"]]
    for record, expected in zip(read_records(data_file(), processor), answers):
        inputs = encode(processor, record).inputs
        kept = inputs["labels"][inputs["labels"] != IGNORED]
        assert [text.strip() for text in processor.tokenizer.decode(kept).split("</s>")] == [*expected, ""]
        assert bool((inputs["input_ids"][inputs["labels"] != IGNORED] == kept).all())


def test_features_are_the_processors(processor, data_file, media_folder):
    record = read_records(data_file(), processor)[6]
    inputs = encode(processor, record).inputs
    assert inputs["pixel_values"].shape[0] == 2 and inputs["input_values"].shape[0] == 1
    ids = inputs["input_ids"]
    for kind, count in (("image", 2), ("audio", 1), ("speech", 1)):
        token = getattr(processor, f"{kind}_token_id")
        assert int((ids == token).sum()) == count * NUM_TOKENS[kind]


def test_a_long_record_is_cut_in_front_of_a_medium(processor, data_file):
    record = read_records(
        data_file(
            [{"image": ["image0.png", "image1.png"], "conversations": turn("<image>", "a") + turn("<image>", "b")}]
        ),
        processor,
    )[0]
    whole = encode(processor, record).inputs
    positions = (whole["input_ids"] == processor.image_token_id).nonzero().flatten().tolist()
    second = positions[NUM_TOKENS["image"]]
    for limit in (second, second + 1, second + 3):
        sample = encode(processor, record, limit)
        assert sample.truncated and len(sample.inputs["input_ids"]) == second
        assert len(sample.inputs["pixel_values"]) == 1 and sample.num_labels
    assert len(encode(processor, record, second + 4).inputs["pixel_values"]) == 2
    # Nothing of the first image fits, and no answer does.
    sample = encode(processor, record, positions[0] + 1)
    assert "pixel_values" not in sample.inputs and not sample.num_labels
    assert not encode(processor, record, len(whole["input_ids"])).truncated


def test_a_template_without_answers_is_refused(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match="generation"):
        check_processor(processor)
