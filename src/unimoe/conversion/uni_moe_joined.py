"""One model with both sound towers, from an audio and a speech release of Uni-MoE, which no original offers.

It is possible where the two decoders are the same, tensor for tensor: then each modality alone is answered as by its own
release. Releases that were fine-tuned apart have different decoders, of which neither reads the other's sounds.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError
from .expressions import evaluate
from .family import Conversion
from .llava import build
from .plan import Plan, model_shapes
from .reader import read_file
from .uni_moe import CHECKPOINT_ORIGIN, UniMoEPaths, plan_uni_moe

# What both models have in common; the audio release's tensors are taken.
SHARED = ("model.language_model.", "lm_head.", "model.vision_tower.", "model.vision_connector.")
SHARED_FIELDS = (
    "text_config",
    "text_sparsity",
    "vision_config",
    "vision_connector_config",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)
NOTE = (
    "The model joins two releases whose decoders are equal: images, videos, audio alone and speech alone are answered as by "
    "the originals. Prompts with both audio and speech were never trained and are not covered by any guarantee."
)


def plan_joined_uni_moe(first: UniMoEPaths, second: UniMoEPaths) -> Conversion:
    """Plans one model from two releases, given in either order; both paths have both sound towers set.

    Compares the decoders' values, and so reads both once.

    Raises:
        ConversionError: The releases are not one audio and one speech model, or their decoders, projectors or tokenizers
            differ; or what `plan_uni_moe` raises.
    """
    by_kind = {_kind(paths.checkpoint): paths for paths in (first, second)}
    if by_kind.keys() != {"audio", "speech"}:
        raise ConversionError(
            f"{first.checkpoint} and {second.checkpoint}: joining needs one audio and one speech release; both are "
            f"{next(iter(by_kind))} releases"
        )
    audio = plan_uni_moe(replace(by_kind["audio"], speech_tower=None, experts=None))
    speech = plan_uni_moe(replace(by_kind["speech"], audio_tower=None))
    names = f"{by_kind['audio'].checkpoint} and {by_kind['speech'].checkpoint}"
    _check_settings(audio, speech, names)
    _check_tokenizers(*(by_kind[kind].tokenizer or by_kind[kind].base for kind in ("audio", "speech")))
    _check_tensors(audio.plan, speech.plan, names)

    config = audio.config.to_dict()
    fields: dict[str, Any] = {
        name: config[name] for name in (*SHARED_FIELDS, "audio_config", "audio_connector_config")
    }
    other = speech.config.to_dict()
    fields |= {name: other[name] for name in ("speech_config", "speech_connector_config")}
    only_speech = {name: target for name, target in speech.plan.targets.items() if not name.startswith(SHARED)}
    plan = Plan({**audio.plan.targets, **only_speech}, known=list(dict.fromkeys(audio.plan.known + speech.plan.known)))
    used = set(plan.used)
    reasons = (
        {source: "equal to the audio release's" for source in speech.plan.used}
        | speech.plan.ignored
        | audio.plan.ignored
    )
    plan.ignored = {source: reason for source, reason in reasons.items() if source not in used}
    joined = build(fields, by_kind["audio"].checkpoint / "config.json")
    plan.check(model_shapes(joined))
    return replace(
        audio,
        config=joined,
        plan=plan,
        title="Uni-MoE audio and speech",
        inputs={
            f"{kind} {name}": path
            for kind, one in (("audio", audio), ("speech", speech))
            for name, path in one.inputs.items()
        },
        feature_extractor=speech.feature_extractor,
        notes=[*audio.notes, NOTE],
    )


def _kind(checkpoint: Path) -> str:
    file = checkpoint / "mm_audio_aligner.bin"
    if not file.is_file():
        raise ConversionError(f"{checkpoint}: mm_audio_aligner.bin is missing{CHECKPOINT_ORIGIN}")
    return "audio" if any(".qformer." in name for name in read_file(file)) else "speech"


def _check_settings(audio: Conversion, speech: Conversion, names: str) -> None:
    ours, theirs = audio.config.to_dict(), speech.config.to_dict()
    for name in SHARED_FIELDS:
        if ours[name] == theirs[name]:
            continue
        differing = [name]
        if isinstance(ours[name], dict) and isinstance(theirs[name], dict):
            differing = [f"{name}.{key}" for key in ours[name] if ours[name][key] != theirs[name].get(key)]
        raise ConversionError(
            f"{names}: cannot be joined, since their decoders are built differently ({', '.join(differing[:4])})"
        )


def _check_tokenizers(audio: Path, speech: Path) -> None:
    contents = [
        file.read_bytes() if (file := base / "tokenizer.model").is_file() else None for base in (audio, speech)
    ]
    if contents[0] != contents[1]:
        raise ConversionError(f"{audio} and {speech}: cannot be joined, since their tokenizers differ")


def _check_tensors(audio: Plan, speech: Plan, names: str) -> None:
    """The smallest tensors first, since releases that were trained apart differ in all of them."""
    shared = [name for name in audio.targets if name.startswith(SHARED)]
    for name in sorted(shared, key=lambda name: torch.Size(audio.targets[name].shape).numel()):
        ours, theirs = (evaluate(plan.targets[name], torch.float32) for plan in (audio, speech))
        if not torch.equal(ours, theirs):
            difference = (ours - theirs).abs().max().item()
            raise ConversionError(
                f"{names}: cannot be joined, since their decoders were trained apart: {name} differs by up to {difference:.2g}, "
                "and neither decoder reads the other's sounds. Convert each by itself"
            )
