"""Router losses of a step do not depend on how the step is cut into batches, whatever the media, lengths and padding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config, tiny_inputs
from torch.nn.functional import pad
from transformers import TrainingArguments

from unimoe import UniMoEForConditionalGeneration
from unimoe.modeling_unimoe.step_statistics import has_batch_statistics, piece_statistics, step_weights, sum_of_pieces
from unimoe.training.trainer import ModalityTrainer

CUTS = ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]], [[0, 3], [1, 2]])
# Text alone, and unlike media of unlike lengths.
ROWS = [(), ("image",), ("image", "video"), ("video", "speech")]
BOTH = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0}
SPARSE = {"num_experts": 3, "top_k": 1}


def sparse_model(scope="batch", reduction="sum", media=False, **text):
    """A model with losses of the decoder's routers, and of those of a sparse tower and connector if asked."""
    how = {"router_loss_scope": scope, "router_loss_reduction": reduction}
    overrides = {"text_sparsity": {"layers": "even", "num_experts": 4, "top_k": 2, **how, **text}}
    if media:
        overrides["vision_sparsity"] = {**SPARSE, **how, **BOTH}
        overrides["vision_connector_config"] = {"type": "mlp", "sparsity": {**SPARSE, **how, **BOTH}}
        overrides["vision_scales"] = [1, 2]
    torch.manual_seed(0)
    return UniMoEForConditionalGeneration(tiny_config(**overrides)).train()


def samples(config):
    """One row of inputs with labels for each of `ROWS`."""
    rows = []
    for number, modalities in enumerate(ROWS):
        row = tiny_inputs(config, 1, modalities, num_text_tokens=3 + 2 * number, seed=number)
        row["labels"] = row["input_ids"].masked_fill(row["input_ids"] >= 90 - 5 * number, -100)
        rows.append(row)
    return rows


def batch_of(rows):
    """The rows, padded on the right to the longest."""
    length, batch = max(row["input_ids"].shape[1] for row in rows), {}
    for row in rows:
        for name, value in row.items():
            if name in ("input_ids", "attention_mask", "labels"):
                value = pad(value, (0, length - value.shape[1]), value=-100 if name == "labels" else 0)
            batch.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in batch.items()}


def step(model, cut):
    """The loss and the gradients of one step, computed in these batches of rows."""
    rows = samples(model.config)
    batches = [batch_of([rows[number] for number in numbers]) for numbers in cut]
    total = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    pieces = []
    for batch in batches:
        with torch.no_grad():
            outputs = model(**batch, output_router_logits=True) if has_batch_statistics(model.config) else None
        pieces.append(piece_statistics(model.config, batch, step_weights(batch["labels"], total).sum(), outputs))
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        output = model(**batch, num_items_in_batch=total, step_statistics=sum_of_pieces(pieces))
        output.loss.backward()
        loss += output.loss.item()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


CASES = {
    "none": {},
    "z": {"router_z_loss_coef": 1.0},
    "sample": {**BOTH, "scope": "sample"},
    "batch": BOTH,
    "sample_mean_media": {**BOTH, "scope": "sample", "reduction": "mean", "media": True},
    "batch_media": {**BOTH, "media": True},
    "batch_mean_media": {**BOTH, "reduction": "mean", "media": True},
    "modalities": {
        "router_modality_loss_coef": 1.0,
        "router_divergence_loss_coef": 1.0,
        "modality_experts": {"image": [1], "video": [0, 2]},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_the_cut(case):
    model = sparse_model(**CASES[case])
    loss, gradient = step(model, CUTS[0])
    for cut in CUTS[1:]:
        other_loss, other = step(model, cut)
        assert other_loss == pytest.approx(loss, abs=2e-5)
        torch.testing.assert_close(other, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["batch", "batch_media", "batch_mean_media", "sample_mean_media"])
def test_a_step_of_one_batch_has_the_loss_of_the_batch(case):
    """The z loss aside, which weighs samples by their predicted tokens."""
    model = sparse_model(**{**CASES[case], "router_z_loss_coef": 0.0, "scope": CASES[case].get("scope", "batch")})
    if case == "sample_mean_media":
        model.config.text_sparsity.router_aux_loss_coef = 0.0
    batch = batch_of(samples(model.config))
    alone = model(**batch).loss
    of_step = model(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss
    torch.testing.assert_close(of_step, alone, atol=1e-5, rtol=1e-5)


def test_media_that_come_encoded_have_their_losses_too():
    model = sparse_model(**CASES["sample_mean_media"])
    rows = samples(model.config)[1]
    total = (rows["labels"][:, 1:] != -100).sum()
    encoded = model.model.encode_media(rows["pixel_values"], output_router_logits=True)
    expected = model(**rows, num_items_in_batch=total).loss
    del rows["pixel_values"]
    found = model(**rows, mm_encoder_outputs=encoded, num_items_in_batch=total).loss
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Steps(ModalityTrainer):
    """Keeps the statistics that it gives to the model."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.given = inputs.get("step_statistics")
        return super().compute_loss(model, inputs, *args, **kwargs)


def trained(tmp_path, model, batch_size, accumulation, **settings):
    arguments = TrainingArguments(
        tmp_path,
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.05,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    rows = 2 * samples(model.config)
    trainer = Steps(model=model, args=arguments, train_dataset=rows, data_collator=batch_of, sampling=None)
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", ["batch", "batch_media", "sample_mean_media"])
def test_accumulated_steps_of_the_trainer(tmp_path, case):
    runs = [trained(tmp_path, sparse_model(**CASES[case]), *sizes) for sizes in ((4, 1), (1, 4), (2, 2))]
    whole, *others = runs
    assert whole.given is None
    for other in others:
        assert other.given is not None
        torch.testing.assert_close(other.model.state_dict(), whole.model.state_dict(), atol=1e-5, rtol=1e-5)
        # The loads of experts among them: the counting pass is not watched. The last entry counts operations.
        for one, expected in zip(other.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
            assert one == pytest.approx(expected, abs=1e-4)


def test_accumulated_steps_with_an_adapter_and_checkpointing(tmp_path):
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        adapter = LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
        model = get_peft_model(sparse_model(**CASES["batch"]), adapter)
        trainer = trained(tmp_path, model, batch_size, accumulation, gradient_checkpointing=True)
        assert (trainer.given is not None) == (accumulation > 1)
        losses.append([entry["loss"] for entry in trainer.state.log_history[:-1]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_losses_without_batch_statistics_cost_no_other_pass(tmp_path):
    trainer = trained(tmp_path, sparse_model(**CASES["sample"]), 2, 2)
    assert trainer.given is None


def test_choices_are_counted_with_the_random_numbers_of_the_step(tmp_path):
    """Noisy routers choose in the counting pass what they choose in the step."""
    model = sparse_model(router_noise="gumbel_choice", **BOTH)
    chosen = []
    gate = model.model.language_model.layers[0].mlp.gate

    def see(module, inputs, output):
        if torch.is_grad_enabled():
            chosen.append(output[2].detach())

    gate.register_forward_hook(see)
    seen = []
    gate.register_forward_hook(lambda module, inputs, output: seen.append(output[2].detach()))
    trained(tmp_path, model, 2, 2)
    # Two micro-batches are counted, then trained, in each of the two steps.
    assert len(seen) == 8 and len(chosen) == 4
    for start in (0, 4):
        for counted, used in zip(seen[start : start + 2], seen[start + 2 : start + 4]):
            assert torch.equal(counted, used)
    assert not torch.equal(seen[0], seen[4])
