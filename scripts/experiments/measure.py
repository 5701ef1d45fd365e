"""What is measured of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from scripts.tiny.questions import MODALITIES
from scripts.tiny.tower_features import FromTowerFeatures
from scripts.tiny.training_data import FeatureCollator, QuestionDataset

QUESTIONS_AT_ONCE = 50
# The held-out questions, the same for all runs.
QUESTION_SEED = 77
TOKENS_OF = ("text", "image", "video", "audio", "speech")


class LossCurve(TrainerCallback):
    """The cross entropy of every training step, without the balancing loss."""

    def __init__(self, model: PreTrainedModel):
        sparsity = model.config.text_sparsity
        self.aux_loss_coef = 0.0 if sparsity is None else sparsity.router_aux_loss_coef
        self.values: list[float] = []
        self._handle = model.register_forward_hook(self._see)

    def _see(self, model: nn.Module, inputs: tuple, outputs: Any) -> None:
        if model.training:
            loss = outputs.loss.detach()
            if self.aux_loss_coef:
                loss = loss - self.aux_loss_coef * outputs.aux_loss.detach()
            self.values.append(float(loss))

    def on_train_end(self, args, state, control, **kwargs):
        self._handle.remove()


@torch.inference_mode()
def held_out(
    model: PreTrainedModel, banks: dict, collator: FeatureCollator, count: int
) -> dict[str, dict[str, float]]:
    """For each modality the share of answers of which every token is right, and the cross entropy of their tokens.

    The right answer's tokens stand in front of each token that is asked for; greedy generation would write the same answers
    right.
    """
    model.eval()
    module = FromTowerFeatures(model)
    found: dict[str, dict[str, float]] = {"accuracy": {}, "loss": {}}
    for modality in MODALITIES:
        questions = QuestionDataset(banks, count, QUESTION_SEED, (modality,))
        right, tokens, loss = 0, 0, 0.0
        for start in range(0, count, QUESTIONS_AT_ONCE):
            batch = collator([questions[index] for index in range(start, min(start + QUESTIONS_AT_ONCE, count))])
            labels = batch.pop("labels")[:, 1:]
            logits = module(**batch).logits[:, :-1].float()
            asked = labels != -100
            right += int(((logits.argmax(-1) == labels) | ~asked).all(dim=1).sum())
            tokens += int(asked.sum())
            loss += float(nn.functional.cross_entropy(logits[asked], labels[asked], reduction="sum"))
        found["accuracy"][modality] = right / count
        found["loss"][modality] = loss / tokens
    return found


def routing(log_history: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """By kind of token, as the mean over the last quarter of the training: the experts' shares of its choices, and the
    routers' entropy as a part of the largest possible one. Empty for a dense model."""
    logs = [log for log in log_history if any(key.startswith("expert_load/") for key in log)]
    logs = logs[-max(len(logs) // 4, 1) :]
    load: dict[str, list[float]] = {}
    entropy: dict[str, float] = {}
    for kind in TOKENS_OF:
        entropies = [log[f"router_entropy/{kind}"] for log in logs if f"router_entropy/{kind}" in log]
        if not entropies:
            continue
        entropy[kind] = sum(entropies) / len(entropies)
        experts = {key for log in logs for key in log if key.startswith(f"expert_load/{kind}/")}
        columns = [
            [log[f"expert_load/{kind}/{e}"] for log in logs if f"expert_load/{kind}/{e}" in log]
            for e in range(len(experts))
        ]
        load[kind] = [sum(column) / len(column) for column in columns]
    return {"expert_load": load, "router_entropy": entropy}
