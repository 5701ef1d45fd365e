"""The monitors: right numbers, in every log, for TensorBoard too; and the sampler under Trainer."""

import math

import pytest
import torch
from training_records import RECORDS, turn
from transformers import Trainer, TrainingArguments

from unimoe import UniMoEForConditionalGeneration
from unimoe.modeling_unimoe.modality_routing import TOKEN_TYPES
from unimoe.training.callbacks import RouterMonitor, add_monitors
from unimoe.training.collator import MultimodalCollator
from unimoe.training.data import ConversationDataset
from unimoe.training.parts import train_only
from unimoe.training.trainer import ModalityTrainer


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 7,
        "max_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    return TrainingArguments(folder, use_cpu=True, remove_unused_columns=False, **{**defaults, **options})


@pytest.fixture
def dataset(processor, data_file):
    return ConversationDataset(data_file(), processor)


def number_of_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_numbers_are_those_of_the_router_logits(make_model, processor, dataset, tmp_path, capsys):
    model, collate = make_model(), MultimodalCollator(processor)
    batch = collate([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        router_logits = model.train()(**batch, output_router_logits=True).router_logits
    hooks = number_of_hooks(model)
    trainer = Trainer(model, arguments(tmp_path), collate, dataset)
    add_monitors(trainer)
    monitor = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RouterMonitor))
    trainer.train()
    # What is trained is printed before the first step.
    assert capsys.readouterr().out.index("memory without activations") >= 0
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)

    ids, real = batch["input_ids"].flatten(), batch["attention_mask"].flatten().bool()
    tokens = {name: ids == getattr(model.config, f"{name}_token_id") for name in TOKEN_TYPES[1:]}
    tokens["text"] = real & ~torch.stack(list(tokens.values())).any(dim=0)
    for number, name in enumerate(TOKEN_TYPES):
        chosen = tokens[name] & real
        counts = [logits[chosen].topk(2).indices.flatten().bincount(minlength=4) for logits in router_logits]
        for layer, count in zip((0, 2), counts):
            assert torch.equal(monitor.load[layer][number], count.double())
        share = sum(count / count.sum() for count in counts) / 2
        entropy = [torch.distributions.Categorical(logits=logits[chosen]).entropy().mean() for logits in router_logits]
        assert logged[f"router_entropy/{name}"] == pytest.approx(sum(entropy).item() / 2 / math.log(4), abs=1e-5)
        for expert in range(4):
            assert logged[f"expert_load/{name}/{expert}"] == pytest.approx(share[expert].item(), abs=1e-6)
    # Hooks are gone when training is over.
    assert monitor._counter is None and not monitor._handles
    assert number_of_hooks(model) == hooks


def test_tensorboard_and_bad_records(make_model, processor, data_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = [RECORDS[4], {"conversations": turn("what", "the" * 200)}]
    dataset = ConversationDataset(data_file(records), processor, max_length=250)
    options = arguments(tmp_path, per_device_train_batch_size=2, report_to="tensorboard")
    ModalityTrainer(make_model(), options, MultimodalCollator(processor), dataset).train()
    (file,) = tmp_path.rglob("events.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/expert_load/text/0", "train/router_entropy/text", "train/data/truncated"} <= set(tags)
    assert events.Scalars("train/data/truncated")[0].value == 1


def test_dropped_choices_are_counted(make_model, processor, dataset, tmp_path):
    config = make_model().config
    config.text_sparsity.capacity_factor = 0.5
    model = UniMoEForConditionalGeneration(config)
    trainer = ModalityTrainer(model, arguments(tmp_path), MultimodalCollator(processor), dataset)
    trainer.train()
    # Half as many places as choices, so at least half of them are dropped (padding takes places too).
    assert all(0.4 < trainer.state.log_history[0][f"dropped/{layer}"] < 1 for layer in (0, 2))


def test_a_dense_model_is_left_alone(make_model, processor, dataset, tmp_path):
    trainer = ModalityTrainer(
        make_model(text_sparsity=None), arguments(tmp_path), MultimodalCollator(processor), dataset
    )
    trainer.train()
    assert not any(key.startswith("expert_load") for key in trainer.state.log_history[0])


def test_a_batch_without_trained_weights(make_model, processor, data_file, tmp_path):
    """Texts teach a connector nothing, and are no error."""
    model = make_model()
    train_only(model, ["audio_connector"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = ConversationDataset(data_file(RECORDS[4:5]), processor)
    ModalityTrainer(model, arguments(tmp_path, weight_decay=0.0), MultimodalCollator(processor), dataset).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_hold_one_mix_in_every_epoch_and_after_resuming(make_model, processor, data_file, tmp_path):
    records = RECORDS[:1] * 3 + RECORDS[4:5] * 3 + RECORDS[2:3] * 2
    dataset = ConversationDataset(data_file(records), processor)

    class Recording(MultimodalCollator):
        def __init__(self, processor):
            super().__init__(processor)
            self.seen = []

        def __call__(self, samples):
            batch = super().__call__(samples)
            self.seen.append((sorted(set(batch) - {"input_ids", "labels", "attention_mask"}), len(samples)))
            return batch

    def run(steps, resume=None, **options):
        model, collator = make_model(), Recording(processor)
        options = arguments(tmp_path, **{"per_device_train_batch_size": 2, "max_steps": steps, **options})
        trainer = ModalityTrainer(model, options, collator, dataset)
        trainer.train(resume_from_checkpoint=resume)
        return model, collator.seen

    _, whole = run(7, save_strategy="steps", save_steps=7)
    model, seen = run(12, save_strategy="steps", save_steps=7)
    # A data loader fetches one batch ahead.
    assert len(seen) in (12, 13) and seen[:7] == whole[:7] and all(size == 2 for _, size in seen)
    resumed, rest = run(12, resume=str(tmp_path / "checkpoint-7"))
    # Trainer skips by index, so skipped batches are never decoded.
    assert rest == seen[7:]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))
