"""Evaluation: whatever media the batches hold, metrics get the logits and the labels, and nothing else."""

import numpy as np
import pytest
import torch
from training_records import RECORDS
from transformers import Trainer, TrainingArguments

from unimoe.training.collator import MultimodalCollator
from unimoe.training.data import ConversationDataset
from unimoe.training.trainer import ModalityTrainer


@pytest.fixture
def evaluated(make_model, processor, data_file, tmp_path):
    """A function that evaluates a model in batches of two records; returns what the metrics were computed from."""
    dataset = ConversationDataset(data_file(), processor)

    def evaluate(kind, **options):
        seen = []
        model = make_model()
        model.config.text_sparsity.router_aux_loss_coef = 1
        trainer = kind(
            model=model,
            args=TrainingArguments(
                tmp_path / "run",
                use_cpu=True,
                remove_unused_columns=False,
                report_to="none",
                per_device_eval_batch_size=2,
                disable_tqdm=True,
            ),
            data_collator=MultimodalCollator(processor),
            eval_dataset=dataset,
            compute_metrics=lambda found: seen.append(found) or {"count": len(found.label_ids)},
            **options,
        )
        metrics = trainer.evaluate()
        assert metrics["eval_count"] == len(RECORDS) and np.isfinite(metrics["eval_loss"])
        return model, dataset, seen[0]

    return evaluate


@pytest.mark.parametrize("kind", [Trainer, ModalityTrainer])
def test_metrics_get_logits_of_batches_with_different_media(evaluated, processor, kind):
    model, dataset, found = evaluated(kind)
    assert found.predictions.shape == (*found.label_ids.shape, model.config.text_config.vocab_size)
    collate = MultimodalCollator(processor)
    for place in range(len(dataset)):
        batch = collate([dataset[place]])
        with torch.no_grad():
            expected = model.eval()(**batch).logits[0].numpy()
        labelled = batch["labels"][0] != -100
        row = found.label_ids[place] != -100
        assert row.sum() == labelled.sum() > 0
        np.testing.assert_allclose(found.predictions[place][row], expected[labelled], atol=1e-5)


def test_logits_can_be_made_smaller_first(evaluated):
    _, _, found = evaluated(Trainer, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1))
    assert found.predictions.shape == found.label_ids.shape
