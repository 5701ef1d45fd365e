"""Data files: formats, paths, and every bad record named by its index."""

import json

import pytest
from PIL import Image
from tiny_processor import tiny_processor
from training_records import RECORDS, turn

import unimoe
from unimoe.training.records import DataError, mix_type, read_records


def test_formats_and_types(processor, data_file):
    records = read_records([data_file(), data_file(RECORDS[:1], "more.jsonl")], processor)
    assert len(records) == 8
    assert [record.name for record in records[6:]] == ["data.json[6]", "more.jsonl[0]"]
    types = [mix_type(record.media, processor.towers) for record in records]
    assert types == [1, 4, 2, 8, 0, 1, 1 + 2 + 8, 1]
    assert [mix_type(record.media, ("image", "speech")) for record in records][:4] == [1, 4, 2, 2]
    # Two frames are one video, two images are two.
    assert len(records[1].media["video"]) == 1 and len(records[6].media["image"]) == 2
    assert records[4].length == 7


def test_lengths_of_the_originals(golden, processor):
    folder = golden("unimoe_speech")
    recorded = json.loads((folder / "cases_v1.5.json").read_text())["modality_lengths_type"]
    records = read_records(
        folder / "inputs" / "train_samples.json", tiny_processor(("image", "video", "speech")), folder
    )
    assert [[record.length, mix_type(record.media, ("speech",))] for record in records] == recorded


def test_paths_start_from_the_root(processor, media_folder, tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(RECORDS[:1] + RECORDS[5:6]))
    with pytest.raises(DataError, match=r"2 of 2 records.*\[0\].*image0.png.*\[1\]"):
        read_records(file, processor)
    records = read_records(file, processor, media_root=media_folder)
    assert str(records[1].media["image"][0]) == str(media_folder / "image1.png")


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "path": "image0.png"},
        {"type": "image", "url": "image0.png"},
        {"type": "image_url", "image_url": "image0.png"},
        {"type": "image_url", "image_url": {"url": "image0.png"}},
    ],
)
def test_paths_of_all_blocks_start_from_the_file_s_folder(processor, data_file, block):
    file = data_file([{"messages": [{"role": "user", "content": [block]}, {"role": "assistant", "content": "a"}]}])
    assert read_records(file, processor)[0].media == {"image": [file.parent / "image0.png"]}


def test_an_ending_in_capitals(processor, data_file):
    file = data_file([RECORDS[4]] * 2, "lines.jsonl")
    assert len(read_records(file.rename(file.with_name("LINES.JSONL")), processor)) == 2


def test_an_animated_webp_in_a_list_is_a_video(processor, data_file):
    file = data_file([{"video": ["a.webp", "b.webp"], "conversations": turn("<video><video>", "x")}])
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.webp", "b.webp"):
        frames[0].save(file.parent / name, save_all=True, append_images=frames[1:])
    assert len(read_records(file, processor)[0].media["video"]) == 2


def test_an_answer_before_the_first_question_is_left_out(processor, data_file):
    first = [{"from": "gpt", "value": "hi"}]
    record = read_records(data_file([{"conversations": first + turn("a", "b")}]), processor)[0]
    assert [message["content"] for message in record.messages] == ["a", "b"]


def test_a_line_ends_at_a_line_feed_only(processor, tmp_path):
    record = {"conversations": turn("a\u2028b\x85c", "d")}
    file = tmp_path / "data.jsonl"
    # With the mark that some editors put first, and with their line ends.
    file.write_bytes(("\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n").encode() + b"\r\n")
    (found,) = read_records(file, processor)
    assert found.messages[0]["content"] == "a\u2028b\x85c"


def test_another_encoding_is_refused_by_the_file_s_name(processor, tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(json.dumps([{"conversations": turn("\u00e9", "x")}], ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError, match=r"data.json: not UTF-8.*save it as UTF-8"):
        read_records(file, processor)


def test_system_turns_are_for_templates_that_know_them(data_file):
    processor = tiny_processor(("image",))
    file = data_file([{"conversations": [{"from": "system", "value": "s"}, *turn("a", "b")]}])
    assert read_records(file, processor)[0].messages[0]["role"] == "system"
    processor.chat_template = unimoe.UniMoEProcessor.from_pretrained(unimoe.tiny_checkpoint()).chat_template
    with pytest.raises(DataError, match=r"\[0\] begins with a system turn"):
        read_records(file, processor)


BAD = {
    "multi_info": ({"multi_info": "x", "conversations": turn("x", "x")}, "'multi_info' must be an object"),
    "tokens": ({"tokens": "12", "conversations": turn("x", "x")}, "'tokens' must be a whole number"),
    "no dict": ("text", "'conversations' or 'messages'"),
    "no turns": ({"conversations": []}, "not be empty"),
    "role": ({"conversations": [{"from": "robot", "value": "x"}]}, "robot"),
    "role of another type": ({"conversations": [{"from": ["human"], "value": "x"}]}, "found from=['human']"),
    "half a character": ({"conversations": turn("x", "cut \ud83d")}, "message 1 holds '\\ud83d', half a character"),
    "order": ({"conversations": [{"from": "human", "value": "x"}] * 2}, "alternate"),
    "no answer": ({"conversations": [{"from": "human", "value": "x"}]}, "last answer"),
    "empty answer": ({"conversations": turn("x", " ")}, "empty answer"),
    "missing file": ({"image": "absent.png", "conversations": turn("<image>", "x")}, "absent.png"),
    "no item": ({"conversations": turn("<image>", "x")}, "0 items under 'image' for 1 <image>"),
    "surplus": ({"image": ["image0.png"] * 2, "conversations": turn("<image>", "x")}, "2 items"),
    "other sound": ({"speech": "speech.wav", "conversations": turn("<audio>", "x")}, "0 items under 'audio'"),
    "voices": ({"voice": ["audio.wav"], "conversations": turn("x", "x")}, "voice"),
    "chat item": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}]},
        "gives no item",
    ),
    "chat kind": ({"messages": [{"role": "user", "content": [{"type": ["image"]}]}]}, "type ['image'] is unknown"),
    "chat role": ({"messages": [{"role": "tool", "content": "x"}]}, "tool"),
}


def test_every_bad_record_is_named(processor, data_file):
    records = [RECORDS[4]] + [record for record, _ in BAD.values()]
    with pytest.raises(DataError) as caught:
        read_records(data_file(records), processor)
    message = str(caught.value)
    assert f"{len(BAD)} of {len(records)} records" in message and "\n" not in message
    for index, (name, (_, words)) in enumerate(BAD.items(), 1):
        part = message.split(f"[{index}] ")[1].split(f"; [{index + 1}]")[0]
        assert words in part, name
    assert "cannot be used: [1] " in message


def test_many_bad_records_are_all_named(processor, data_file):
    with pytest.raises(DataError, match="; and 20, 21, 22, 23, 24"):
        read_records(data_file([{}] * 25), processor)


def test_one_sound_tower_takes_sounds_by_any_name(data_file):
    records = [
        {key: "audio.wav", "conversations": turn(f"<{tag}>", "x")}
        for key in ("audio", "speech", "voice")
        for tag in ("audio", "speech")
    ]
    found = read_records(data_file(records), tiny_processor(("image", "speech")))
    assert [list(record.media) for record in found] == [["audio"], ["speech"]] * 3


def test_a_kind_without_a_tower(data_file):
    with pytest.raises(DataError, match=r"\[1\] holds video.*\[2\] holds audio"):
        read_records(data_file(RECORDS[:3]), tiny_processor(("image",)))


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.json", "{", "JSON"),
        ("a.json", "{}", "list"),
        ("a.json", "[]", "no rec"),
        ("a.json", "[" * 100_000, "a.json: not valid JSON"),
        ("a.json", f"[{10**4000}{10**4000}]", "a.json: not valid JSON"),
        ("a.jsonl", "[" * 100_000, r"\[0\] not valid JSON"),
    ],
)
def test_unusable_files(processor, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_records(tmp_path / name, processor)
    (tmp_path / "b.jsonl").write_text('{"conversations": []}\nnot json\n')
    with pytest.raises(DataError, match=r"\[1\] not valid JSON"):
        read_records(tmp_path / "b.jsonl", processor)
