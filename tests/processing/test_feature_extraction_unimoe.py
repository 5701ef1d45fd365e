import json
import math

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import WhisperFeatureExtractor

from unimoe.processing import feature_extraction_unimoe as module
from unimoe.processing import spectrograms
from unimoe.processing.feature_extraction_unimoe import UniMoEFeatureExtractor
from unimoe.processing.media import load_audio
from unimoe.processing.spectrograms import kaldi_filterbank

# Of log-mels, on processors whose matrix products add up in another order for another shape.
ROUNDING = 2.5e-7


@pytest.fixture(scope="module")
def audio_golden(golden):
    folder = golden("unimoe_audio")
    return folder, {k: v.clone() for k, v in load_file(folder / "cases.safetensors").items() if "fbank" in k}


@pytest.fixture(scope="module")
def extractor():
    return UniMoEFeatureExtractor()


def noise(samples, seed=0):
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


# Sound tower


@pytest.mark.parametrize("clip", ["clip_a", "clip_b", "stereo_44k"])
def test_filterbank_of_unpadded_clips_matches_golden(audio_golden, clip):
    folder, tensors = audio_golden
    waveform = torch.from_numpy(load_audio(folder / "assets" / f"{clip}.wav"))
    features = (kaldi_filterbank(waveform, 128, 16000) - 15.41663) / (2 * 6.55582)
    expected = tensors[f"component_fbank.{clip}.fbank"][0]
    assert features.shape == expected.shape
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["audio", "image_audio", "video_audio", "audio_long", "audio_resampled"])
def test_chunks_match_golden(audio_golden, extractor, case):
    folder, tensors = audio_golden
    metadata = json.loads((folder / "cases.json").read_text())[case]
    output = extractor.extract_audio([load_audio(folder / metadata["inputs"]["voice"])])
    values, mask = torch.from_numpy(output["input_values"]), output["input_values_mask"]
    valid = metadata["valid_samples_per_chunk"]
    assert output["num_chunks"] == [len(valid)]
    assert mask.sum(axis=1).tolist() == [min(math.ceil(samples / 160), 2998) for samples in valid]
    first_rows = tensors.get(f"{case}.fbank_first_rows")
    if first_rows is not None:
        torch.testing.assert_close(values[:, : first_rows.shape[1]], first_rows, atol=1e-4, rtol=0)
    means, expected = values.mean(-1), tensors[f"{case}.fbank_row_means"]
    # A frame that lies in the padding altogether holds rounding noise of the repeated last sample where that sample is
    # not a 16-bit value, that is after resampling; the mask keeps the encoder from reading such frames.
    if case == "audio_resampled":
        means, expected = means[:, : int(mask.sum())], expected[:, : int(mask.sum())]
    else:
        torch.testing.assert_close(values[:, -1], tensors[f"{case}.fbank_last_row"], atol=1e-4, rtol=0)
    torch.testing.assert_close(means, expected, atol=1e-4, rtol=0)


def test_filterbank_of_silence_is_the_floor():
    features = kaldi_filterbank(torch.zeros(480000), 128, 16000)
    assert features.shape == (2998, 128)
    assert torch.equal(features, torch.full_like(features, math.log(1.1920928955078125e-07)))


def test_mask_equals_the_originals_sample_mask(extractor):
    for samples in (1, 159, 160, 161, 12345, 479680, 479681, 480000):
        padding = np.arange(480000) >= samples
        expected = ~padding[:479680].reshape(2998, 160).all(axis=1)
        mask = extractor.extract_audio([np.zeros(samples, np.float32)])["input_values_mask"]
        assert mask.dtype == np.int64
        assert np.array_equal(mask[0], expected.astype(np.int64)), samples


@pytest.mark.parametrize("samples,chunks", [(1, 1), (300, 1), (480000, 1), (480001, 2), (960000, 2), (960001, 3)])
def test_number_of_audio_chunks(extractor, samples, chunks):
    output = extractor.extract_audio([np.zeros(samples, np.float32)])
    assert output["num_chunks"] == [chunks]
    assert output["input_values"].shape == (chunks, 2998, 128)
    assert output["input_values"].dtype == np.float32


def test_padding_repeats_the_last_sample():
    extractor = UniMoEFeatureExtractor(audio_chunk_samples=4000)
    sound = noise(5000)
    values = extractor.extract_audio([sound])["input_values"]
    by_hand = extractor.extract_audio([np.concatenate([sound, np.full(3000, sound[-1])])])["input_values"]
    assert np.array_equal(values, by_hand)


def test_too_long_audio_is_cut_with_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    extractor = UniMoEFeatureExtractor(audio_chunk_samples=1600, audio_max_chunks=20)
    output = extractor.extract_audio([noise(1600), noise(1600 * 20 + 1)])
    assert output["num_chunks"] == [1, 20]
    assert len(warnings) == 1 and "audio[1] lasts 2.0 s; only its first 2.0 s (20 chunks)" in warnings[0]
    unlimited = UniMoEFeatureExtractor(audio_chunk_samples=1600, audio_max_chunks=None)
    assert unlimited.extract_audio([noise(1600 * 20 + 1)])["num_chunks"] == [21]


def test_chunks_of_one_sound_are_consecutive():
    extractor = UniMoEFeatureExtractor(audio_chunk_samples=1600, speech_chunk_samples=1600, speech_chunk_stride=1600)
    sounds = [noise(4000, 1), noise(800, 2), noise(3200, 3)]
    for method, key in ((extractor.extract_audio, "input_values"), (extractor.extract_speech, "input_features")):
        together = method(sounds)
        assert together["num_chunks"] == [3, 1, 2]
        assert np.array_equal(together[key], np.concatenate([method([sound])[key] for sound in sounds]))


# Speech tower


@pytest.mark.parametrize("name,cases", [("unimoe_speech", "cases_e2"), ("unimoe_speech", "cases_v1.5"),
                                        ("unimoe_8e", "cases_dense")])  # fmt: skip
def test_log_mels_match_golden(golden, extractor, name, cases):
    folder = golden(name)
    tensors = load_file(folder / f"{cases}.safetensors")
    files = {
        "speech_short.input_features": ["short.wav"],
        "speech_long.input_features": ["long.wav"],
        "image_speech.input_features_head": ["stereo22k.wav"],
        "two_speech_files.input_features_head": None,
    }
    media = json.loads((folder / f"{cases}.json").read_text())["cases"]
    checked = 0
    for key, paths in files.items():
        if key not in tensors:
            continue
        case = media[key.split(".")[0]]["media"]
        paths = paths or [path.split("/")[-1] for path in case["voice"]]
        output = extractor.extract_speech([load_audio(folder / "inputs" / path) for path in paths])
        expected = tensors[key].clone().flatten(0, 1)
        assert sum(output["num_chunks"]) == len(expected)
        features = torch.from_numpy(output["input_features"])[..., : expected.shape[-1]]
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)
        checked += 1
    assert checked


@pytest.mark.parametrize("samples,chunks", [(1, 1), (480000, 1), (480001, 1), (480002, 2), (960002, 2), (960003, 3)])
def test_number_of_speech_chunks_follows_the_original(extractor, samples, chunks):
    output = extractor.extract_speech([np.zeros(samples, np.float32)])
    assert output["num_chunks"] == [chunks]
    assert output["input_features"].shape == (chunks, 80, 3000)
    assert output["input_features"].dtype == np.float32


def test_log_mels_equal_transformers_own(extractor):
    sound = noise(500000)
    whisper = WhisperFeatureExtractor()
    features = extractor.extract_speech([sound])["input_features"]
    for row, chunk in zip(features, (sound[:480000], sound[480001:])):
        expected = whisper(chunk, sampling_rate=16000, return_tensors="np")["input_features"][0]
        np.testing.assert_allclose(row, expected, rtol=0, atol=ROUNDING)


def test_stride_without_loss():
    extractor = UniMoEFeatureExtractor(speech_chunk_stride=480000)
    sound = noise(500000)
    expected = WhisperFeatureExtractor()(sound[480000:], sampling_rate=16000, return_tensors="np")["input_features"]
    np.testing.assert_allclose(
        extractor.extract_speech([sound])["input_features"][1:], expected, rtol=0, atol=ROUNDING
    )


def test_speech_chunks_can_be_limited():
    extractor = UniMoEFeatureExtractor(speech_chunk_samples=3200, speech_chunk_stride=3200, speech_max_chunks=2)
    output = extractor.extract_speech([noise(16000)])
    assert output["num_chunks"] == [2]
    assert output["input_features"].shape == (2, 80, 20)


# The whole


def test_short_chunks_of_both_towers():
    extractor = UniMoEFeatureExtractor(
        audio_chunk_samples=32000, speech_chunk_samples=32000, speech_chunk_stride=32000, num_mel_bins=64,
        speech_feature_size=40,
    )  # fmt: skip
    output = extractor(audio=noise(100), speech=[noise(100), noise(40000)], sampling_rate=16000, return_tensors="pt")
    assert output["input_values"].shape == (1, 198, 64) and extractor.audio_num_frames == 198
    assert output["input_values_mask"].sum() == 1
    assert output["input_features"].shape == (3, 40, 200) and extractor.speech_num_frames == 200
    assert all(torch.isfinite(output[key]).all() for key in output)
    assert set(output) == set(extractor.model_input_names)


def test_call_with_one_kind(extractor):
    assert set(extractor(audio=noise(100))) == {"input_values", "input_values_mask"}
    assert set(extractor(speech=torch.from_numpy(noise(100)))) == {"input_features"}
    assert extractor(speech=[0.1, 0.2])["input_features"].shape == (1, 80, 3000)


def test_no_sounds_give_empty_features(extractor):
    assert extractor.extract_audio([])["input_values"].shape == (0, 2998, 128)
    assert extractor.extract_audio([])["input_values_mask"].shape == (0, 2998)
    assert extractor.extract_speech([])["input_features"].shape == (0, 80, 3000)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_defaults_for_new_tensors_do_not_matter(default):
    """Users set them for their models: narrow or wide numbers, an accelerator (for which "meta" stands here)."""

    def extract():
        for made_once in ("_povey_window", "_kaldi_mel_filters", "_whisper_window_and_filters"):
            getattr(spectrograms, made_once).cache_clear()
        return UniMoEFeatureExtractor()(audio=noise(4000), speech=noise(4000))

    expected = extract()
    try:
        if default == "meta":
            with torch.device(default):
                found = extract()
        else:
            torch.set_default_dtype(default)
            found = extract()
    finally:
        torch.set_default_dtype(torch.float32)
    for name in expected:
        assert found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name]), name


def test_saved_and_loaded(tmp_path):
    extractor = UniMoEFeatureExtractor(
        audio_chunk_samples=32000, audio_max_chunks=None, num_mel_bins=64, speech_chunk_samples=16000,
        speech_max_chunks=3, speech_feature_size=40,
    )  # fmt: skip
    before = extractor(audio=noise(20000), speech=noise(20000))
    extractor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    loaded = UniMoEFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    after = loaded(audio=noise(20000), speech=noise(20000))
    assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("argument,value", [
    ("sampling_rate", 0), ("sampling_rate", 16000.0), ("sampling_rate", 100), ("audio_chunk_samples", 399),
    ("audio_max_chunks", 0), ("num_mel_bins", -1), ("num_mel_bins", True), ("audio_mean", float("nan")),
    ("audio_std", 0), ("audio_std", "6"), ("speech_chunk_samples", 16001), ("speech_chunk_samples", 160),
    ("speech_chunk_stride", 479999), ("speech_max_chunks", 1.5), ("speech_feature_size", 0), ("n_fft", None),
    ("hop_length", 0),
])  # fmt: skip
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        UniMoEFeatureExtractor(**{argument: value})


@pytest.mark.parametrize("waveform,complaint", [
    (np.zeros(0), "no samples"),
    (np.zeros((2, 100)), r"mono with shape \[samples\], got shape \[2, 100\]"),
    (np.array([0.0, np.nan]), "NaN or infinite"),
    (torch.tensor([0.0, math.inf]), "NaN or infinite"),
])  # fmt: skip
def test_bad_waveforms_are_named(extractor, waveform, complaint):
    with pytest.raises(ValueError, match=rf"audio\[1\].*{complaint}"):
        extractor.extract_audio([noise(10), waveform])
    with pytest.raises(ValueError, match=rf"speech\[1\].*{complaint}"):
        extractor.extract_speech([noise(10), waveform])


def test_bad_calls(extractor):
    with pytest.raises(ValueError, match="Neither `audio` nor `speech`"):
        extractor()
    with pytest.raises(ValueError, match="`sampling_rate` is 8000 Hz"):
        extractor(audio=noise(100), sampling_rate=8000)


def test_golden_clips_are_sixteen_bit(audio_golden):
    folder, _ = audio_golden
    assert soundfile.info(folder / "assets" / "clip_a.wav").subtype == "PCM_16"
