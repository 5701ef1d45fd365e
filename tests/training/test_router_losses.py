"""Router losses of a step do not depend on how the step is cut into batches, whatever the lengths and the padding."""

import pytest
import torch

from unimoe import UniMoEForConditionalGeneration
from unimoe.training.upcycling import UniMoESparsityConfig

CUTS = ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]], [[0, 3], [1, 2]])


@pytest.fixture
def gradients(make_model):
    """A function from the losses' settings to the loss and the gradients of a step, for each of `CUTS`."""

    def compute(**sparsity):
        config = make_model().config
        config.text_sparsity = UniMoESparsityConfig(layers="even", num_experts=4, top_k=2, **sparsity)
        torch.manual_seed(0)
        model = UniMoEForConditionalGeneration(config)
        input_ids = torch.randint(3, 99, (4, 12))
        labels, mask = input_ids.clone(), torch.ones_like(input_ids)
        labels[0, :5] = labels[1, :9] = labels[2, 9:] = -100
        mask[2, 9:] = 0
        total = (labels[:, 1:] != -100).sum()
        results = []
        for cut in CUTS:
            model.zero_grad()
            loss = 0.0
            for rows in cut:
                # A batch is padded to its own longest row only.
                end = int(mask[rows].sum(dim=1).max())
                part = {"input_ids": input_ids[rows, :end], "attention_mask": mask[rows, :end]}
                output = model(**part, labels=labels[rows, :end], num_items_in_batch=total)
                output.loss.backward()
                loss += output.loss.item()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((loss, gradient))
        return results

    return compute


@pytest.mark.parametrize(
    "sparsity",
    [
        {},
        {"router_z_loss_coef": 1.0},
        {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0, "router_loss_scope": "sample"},
        {"router_aux_loss_coef": 1.0, "router_loss_scope": "sample", "router_loss_reduction": "mean"},
    ],
)
def test_gradients_do_not_depend_on_the_cut(gradients, sparsity):
    (loss, gradient), *others = gradients(**sparsity)
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(other, gradient, atol=1e-5, rtol=0)


def test_the_balance_of_whole_batches_depends_on_them(gradients):
    """The originals' balancing loss is a product of two means over the batch at hand; it is only weighted right."""
    (_, gradient), (_, other), *_ = gradients(router_aux_loss_coef=1.0)
    assert (gradient - other).abs().max() > 1e-3
