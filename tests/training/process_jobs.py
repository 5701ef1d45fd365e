"""What the processes of `test_several_processes` do."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForMultimodalLM, AutoProcessor, DistributedConfig, TrainingArguments

from unimoe.training import stages
from unimoe.training.collator import MultimodalCollator
from unimoe.training.data import ConversationDataset
from unimoe.training.recipe import Recipe
from unimoe.training.trainer import ModalityTrainer


def train(recipes: Sequence[str], resume: bool = False) -> None:
    """One recipe after the other, by the same processes."""
    for recipe in recipes:
        stages.run_recipe(Recipe.read(recipe), resume=resume)


def train_with_fsdp(recipes: Sequence[str], resume: bool = False) -> None:
    """The same with accelerate's FSDP2. It ignores the wish for it on CPU, so it is told that these are GPUs."""
    original = stages.training_arguments

    def training_arguments(recipe: Recipe) -> TrainingArguments:
        arguments = original(recipe)
        PartialState().distributed_type = DistributedType.MULTI_GPU
        return arguments

    stages.training_arguments = training_arguments
    train(recipes, resume)


def check_epoch(model: str, data: str, folder: str) -> None:
    """Every step of an epoch has one mix of modalities, in all processes, and no record is left out."""
    processor = AutoProcessor.from_pretrained(model)
    dataset = _Seen(data, processor)
    arguments = TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=2, remove_unused_columns=False, report_to="none"
    )
    trainer = ModalityTrainer(
        model=AutoModelForMultimodalLM.from_pretrained(model),
        args=arguments,
        train_dataset=dataset,
        data_collator=MultimodalCollator(processor),
    )
    for _ in trainer.get_train_dataloader():
        pass
    # The loader reads one batch ahead, but in order.
    steps = [dataset.seen[start : start + 2] for start in range(0, len(dataset.seen), 2)]
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, steps)
    assert len({len(steps) for steps in everywhere}) == 1
    for step in zip(*everywhere):
        assert len({dataset.types[index] for batch in step for index in batch}) == 1
    assert {index for steps in everywhere for step in steps for index in step} == set(range(len(dataset)))


class _Seen(ConversationDataset):
    seen: list[int] = []

    def __getitem__(self, index: int):
        self.seen.append(index)
        return super().__getitem__(index)


def check_expert_parallel(model: str, inputs: str, expected: str, learning_rate: float) -> None:
    """Half of the experts in each process: logits, loss and the weights after a step of SGD are those of `expected`."""
    batch, outputs = load_file(inputs), load_file(f"{expected}/outputs.safetensors")
    for implementation in ("all_reduce", "all_to_all"):
        sharding = DistributedConfig(tp_size=2, tp_plan="auto", ep_size=2, ep_implementation=implementation)
        sharded = AutoModelForMultimodalLM.from_pretrained(model, distributed_config=sharding).train()
        experts = sharded.model.language_model.layers[0].mlp.experts
        assert isinstance(experts.down_proj, DTensor) and experts.down_proj.to_local().shape[0] == 2
        found = step(sharded, batch, learning_rate)
        torch.testing.assert_close(found, outputs, atol=1e-5, rtol=0)
        weights = {name: _whole(value) for name, value in sharded.state_dict().items()}
        torch.testing.assert_close(weights, load_file(f"{expected}/model.safetensors"), atol=1e-5, rtol=0)


def step(model: torch.nn.Module, inputs: dict[str, torch.Tensor], learning_rate: float) -> dict[str, torch.Tensor]:
    """One step of SGD; the logits and the loss before it."""
    outputs = model(**inputs)
    outputs.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad
    return {"logits": outputs.logits.detach(), "loss": outputs.loss.detach()}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
