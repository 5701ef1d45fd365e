"""The data set: lazy decoding in workers, unreadable files, counting."""

import pytest
import torch
from tiny_processor import tiny_processor
from torch.utils.data import DataLoader
from training_records import RECORDS, turn

from unimoe.training.collator import MultimodalCollator
from unimoe.training.data import ConversationDataset
from unimoe.training.parts import can_change
from unimoe.training.records import DataError


def damaged(data_file, count=3):
    """Images of which the second is no image; text in between."""
    records = [{"image": f"image{i}.png", "conversations": turn("<image>", f"{i}")} for i in range(count)]
    file = data_file([*records, *RECORDS[4:5]])
    broken = file.parent / "image1.png"
    broken.unlink()
    broken.write_bytes(b"not an image")
    return file


def test_unreadable_media_are_skipped_and_counted(processor, data_file):
    dataset = ConversationDataset(damaged(data_file), processor)
    loader = DataLoader(dataset, batch_size=1, num_workers=1, collate_fn=list)
    for _ in range(2):
        samples = [batch[0] for batch in loader]
        # The next record of the same mix stands in.
        assert torch.equal(samples[1].inputs["labels"], samples[2].inputs["labels"])
        assert dataset.counts() == {"unreadable": 1, "truncated": 0, "without_answer": 0}


def test_kinds_of_media(data_file):
    file = data_file(RECORDS)
    both, one = (tiny_processor(("image", "video", *sounds)) for sounds in (("audio", "speech"), ("speech",)))
    assert ConversationDataset(file, both).media_kinds() == {"image", "video", "audio", "speech"}
    # There, all sounds go through the one tower.
    assert ConversationDataset(file, one).media_kinds() == {"image", "video", "speech"}
    assert not ConversationDataset(data_file([{"conversations": turn("a", "b")}], "text.json"), one).media_kinds()


@pytest.mark.parametrize(
    "parts, media, expected",
    [
        (["connectors"], [], False),
        (["connectors"], ["audio"], True),
        (["vision_connector", "audio_tower"], ["speech"], False),
        (["vision_tower"], ["video"], True),
        (["vision_tower", "attention"], [], True),
        ([], [], True),
    ],
)
def test_what_can_change(parts, media, expected):
    assert can_change(parts, media) is expected


def test_it_ends_like_a_list(processor, data_file):
    dataset = ConversationDataset(data_file([{"conversations": turn("a", str(i))} for i in range(3)]), processor)
    assert len(list(dataset)) == 3
    assert torch.equal(dataset[-1].inputs["input_ids"], dataset[2].inputs["input_ids"])
    with pytest.raises(IndexError, match="record 3 of 3"):
        dataset[3]


def test_unreadable_media_stop_the_run(processor, data_file):
    dataset = ConversationDataset(damaged(data_file), processor, on_unreadable="stop")
    assert dataset[0].num_labels
    with pytest.raises(DataError, match=r"data.json\[1\].*image1.png"):
        dataset[1]


def test_nothing_readable_is_an_error(processor, data_file):
    file = data_file(RECORDS[:1])
    dataset = ConversationDataset(file, processor)
    (file.parent / "image0.png").unlink()
    (file.parent / "image0.png").write_bytes(b"")
    with pytest.raises(DataError, match="nor any other.*image0.png.*empty"):
        dataset[0]


def test_why_no_record_can_be_used(processor, data_file):
    late = [*turn("a", "b"), *turn("c" * 99 + "<image>", "d")]
    file = data_file([{"conversations": turn("a", "b")}, {"image": "image0.png", "conversations": late}])
    with pytest.raises(DataError, match=r"data.json\[0\].*: no answer within 3 tokens"):
        ConversationDataset(file, processor, max_length=3)[0]
    with pytest.raises(DataError, match=r"data.json\[1\].*: a medium is not within 220 tokens"):
        ConversationDataset(file, processor, max_length=220)[1]


def test_long_records_are_counted(processor, data_file):
    file = data_file([{"conversations": turn("a", "b" * 50)}, {"conversations": turn("a" * 300, "b")}])
    dataset = ConversationDataset(file, processor, max_length=200)
    # Of the second, the answer lies behind the cut; the first stands in.
    assert torch.equal(dataset[0].inputs["input_ids"], dataset[1].inputs["input_ids"])
    assert len(dataset[0].inputs["input_ids"]) == 200
    assert dataset.counts() == {"unreadable": 0, "truncated": 2, "without_answer": 1}


def test_a_record_that_loses_its_only_image_is_replaced(processor, data_file):
    late = {"image": "image0.png", "conversations": turn("a", "b") + turn("c" * 99 + "<image>", "d")}
    file = data_file([late, {"image": "image1.png", "conversations": turn("<image>", "b")}])
    dataset = ConversationDataset(file, processor, max_length=220)
    assert torch.equal(dataset[0].inputs["pixel_values"], dataset[1].inputs["pixel_values"])
    assert dataset.counts() == {"unreadable": 0, "truncated": 1, "without_answer": 0}


def test_arguments(processor, data_file):
    with pytest.raises(ValueError, match="maybe"):
        ConversationDataset(data_file(), processor, on_unreadable="maybe")
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        ConversationDataset(data_file(), processor, max_length=0)
    with pytest.raises(DataError, match="no data file"):
        ConversationDataset([], processor)
    dataset = ConversationDataset(data_file(), processor)
    assert dataset.types == [1, 4, 2, 8, 0, 1, 11] and len(dataset.lengths) == len(dataset) == 7


def test_a_batch_of_everything(processor, data_file):
    records = [*RECORDS, {"video": ["frame0.png", "frame1.png", "frame2.png"], "conversations": turn("<video>", "x")}]
    dataset = ConversationDataset(data_file(records), processor)
    samples = [dataset[i] for i in range(len(dataset))]
    batch = MultimodalCollator(processor)(samples)
    assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["pixel_values_videos"].shape == (2, 3, 3, 16, 16)
    assert batch["video_frame_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert len(batch["input_values"]) == len(batch["input_values_mask"]) == 2 and len(batch["input_features"]) == 2
    for i, sample in enumerate(samples):
        end = len(sample.inputs["input_ids"])
        for name, fill in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
            assert torch.equal(batch[name][i, :end], sample.inputs[name])
            assert (batch[name][i, end:] == fill).all()
    wide = MultimodalCollator(processor, pad_to_multiple_of=64)(samples)
    assert wide["labels"].shape[1] % 64 == 0 and "video_frame_mask" not in MultimodalCollator(processor)(samples[:3])


def test_a_mixed_batch_gives_the_losses_of_its_rows(processor, data_file, make_model):
    model = make_model().eval()
    dataset = ConversationDataset(data_file(), processor)
    samples = [dataset[i] for i in range(len(dataset))]
    collate = MultimodalCollator(processor)
    with torch.no_grad():
        alone = [model(**collate([sample])).loss * sample.num_labels for sample in samples]
        together = model(**collate(samples)).loss
    torch.testing.assert_close(together, sum(alone) / sum(sample.num_labels for sample in samples), atol=1e-5, rtol=0)
