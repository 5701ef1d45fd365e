"""What is compared: every way to train the same decoder on the same questions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path("docs/claims/results.json")
TOP_K = 2
AUX_LOSS = 0.01
# The modalities that stage 2 tunes FFNs for; each list of groups makes as many experts.
FOUR = (("image",), ("video",), ("audio",), ("speech",))
TWO = (("image", "video"), ("audio", "speech"))
CONNECTORS = {
    "image": "vision_connector",
    "video": "vision_connector",
    "audio": "audio_connector",
    "speech": "speech_connector",
}


@dataclass(frozen=True)
class Condition:
    """One model and its training.

    Args:
        title: As it stands in tables and plots.
        start: "tuned" (experts from stage 2), "copies" of stage 1's FFN, "fresh" random experts, "wide" (dense, with the FFN
            twice as wide, so that it activates as many parameters as two experts).
        experts: The groups of modalities that the tuned experts come from.
        all_questions: Trains on the questions of stage 2 as well, mixed with those of stage 3, so that it sees just the
            questions that a model with tuned experts has seen in both stages.
        aux_loss: Weight of the balancing loss.
    """

    title: str
    start: str
    experts: tuple[tuple[str, ...], ...] = FOUR
    all_questions: bool = False
    aux_loss: float = 0.0


CONDITIONS = {
    "tuned": Condition("4 tuned experts", "tuned"),
    "tuned_aux": Condition("4 tuned experts, balancing loss", "tuned", aux_loss=AUX_LOSS),
    "two": Condition("2 tuned experts", "tuned", experts=TWO),
    "copies_short": Condition("4 copies, stage 3 only", "copies"),
    "copies_short_aux": Condition("4 copies, stage 3 only, balancing loss", "copies", aux_loss=AUX_LOSS),
    "copies": Condition("4 copies", "copies", all_questions=True),
    "wide": Condition("dense, FFN twice as wide", "wide", all_questions=True),
    "fresh": Condition("4 fresh experts", "fresh", all_questions=True),
}


@dataclass(frozen=True)
class Settings:
    """How long and on what is trained; the same for all conditions.

    Args:
        align_steps: Steps of stage 1. Few, so that much is left to learn behind it.
        expert_steps: Steps of stage 2 for each of the four modalities.
        mixed_steps: Steps of stage 3.
        align_rate, learning_rate: Highest learning rates of stage 1 and of what follows.
        questions: Held-out questions for each modality.
        layers: The decoder's layers that become sparse, or wide. In all of them, nothing that stage 2 tunes is lost.
    """

    align_steps: int = 80
    expert_steps: int = 30
    mixed_steps: int = 120
    batch_size: int = 16
    align_rate: float = 2e-3
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    questions: int = 200
    layers: str = "all"

    def steps(self, condition: Condition) -> int:
        """Steps behind stage 2."""
        return self.mixed_steps + (len(FOUR) * self.expert_steps if condition.all_questions else 0)

    def group_steps(self, group: tuple[str, ...]) -> int:
        """Steps of stage 2 for a group of modalities."""
        return len(group) * self.expert_steps

    def as_json(self) -> dict:
        return asdict(self)
