"""What a family's reader hands to the writer: everything about a converted checkpoint but its bytes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..modeling_unimoe.configuration_unimoe import UniMoEConfig
from .plan import Plan


@dataclass
class Conversion:
    """A conversion that is planned and checked, so that only writing can still fail.

    Args:
        config: The model's configuration.
        plan: Its tensors.
        title: What is converted, for people.
        inputs: What was read, by the option that named it.
        licence: The licence notice of the model card.
        tokenizer_folder: Where tokenizer files are looked for; None for nowhere.
        tokenizer_required: Whether that folder was named for its tokenizer, so that it must have one.
        image_processor_folder: Where `preprocessor_config.json` of the vision tower lies.
        feature_extractor: Settings of the feature extractor; None for a model without sound towers.
        generation: Settings of the generation configuration: the originals' sampling.
        chat_template: Jinja text; None for the processor's default.
        image_aspect_ratio: How images become square, as the processor takes it: "square" or "pad".
        max_length: Tokens that a prompt may have; None for the decoder's positions.
        licence_id: The licence in the model card's header, by the Hub's name for it; "research-only" is none of those.
        notes: Remarks for the user, each a sentence.
    """

    config: UniMoEConfig
    plan: Plan
    title: str
    inputs: dict[str, Path]
    licence: str
    tokenizer_folder: Path | None = None
    tokenizer_required: bool = False
    image_processor_folder: Path | None = None
    feature_extractor: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    image_aspect_ratio: str = "square"
    max_length: int | None = None
    licence_id: str = "research-only"
    notes: list[str] = field(default_factory=list)
