"""Runs a recipe: one stage of Uni-MoE's, MoE-LLaVA's or CuMo's training, with `transformers.Trainer` as the loop."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel, get_peft_model
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..upcycling import upcycle
from .collator import MultimodalCollator
from .data import ConversationDataset
from .lora import lora_config
from .parts import train_only
from .recipe import Recipe
from .trainer import ModalityTrainer
from .upcycling import assemble_experts

logger = logging.get_logger(__name__)

RECIPE_FILE = "recipe.json"
# Written last by Trainer, so a checkpoint that has a whole one is whole.
STATE_FILE = "trainer_state.json"


def run_recipe(recipe: Recipe, resume: bool = False) -> Path:
    """Trains one stage from its data to its finished checkpoint.

    Args:
        recipe: what to do.
        resume: go on from the last whole checkpoint in the recipe's output, or begin where there is none yet.

    Returns:
        The folder of the finished checkpoint, `<output>/model`.

    Raises:
        DataError: the data cannot be trained on.
        ValueError: the output holds another run, the model or an expert's checkpoint does not fit, or an argument is wrong.
    """
    output = Path(recipe.output)
    state = PartialState()
    if not (Path(recipe.model) / "config.json").is_file():
        raise ValueError(f"model: {recipe.model} has no config.json; give the folder of a checkpoint")
    arguments = training_arguments(recipe)
    processor = AutoProcessor.from_pretrained(recipe.model)
    train_data, eval_data = (
        ConversationDataset(
            files,
            processor,
            media_root=recipe.media_root,
            max_length=recipe.max_length,
            on_unreadable=recipe.on_unreadable,
        )
        if files
        else None
        for files in (recipe.data, recipe.eval_data)
    )
    if state.is_main_process:
        _claim(output, recipe, resume)
    state.wait_for_everyone()
    # Before any weight is drawn: those of adapters and routers depend on it.
    set_seed(arguments.seed)
    base = _starting_point(recipe, processor, output, state)
    model = prepare_model(AutoModelForMultimodalLM.from_pretrained(base, dtype=recipe.dtype), recipe)
    trainer = ModalityTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=MultimodalCollator(processor),
        processing_class=processor,
        sampling=None if recipe.sampling == "none" else recipe.sampling,
    )
    checkpoint = last_whole_checkpoint(output) if resume else None
    if checkpoint is not None:
        logger.warning(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if state.is_main_process:
        _save(model, processor, output)
        for kind, count in train_data.counts().items():
            if count:
                print(f"{count} of {len(train_data)} records: {kind.replace('_', ' ')}")
    state.wait_for_everyone()
    return output / "model"


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's `TrainingArguments`, which log to TensorBoard where it is installed unless told otherwise."""
    defaults: dict[str, Any] = {
        "report_to": "tensorboard" if is_tensorboard_available() else "none",
        "prediction_loss_only": True,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
    }
    # The collator takes samples, of which Trainer knows no columns.
    return TrainingArguments(
        output_dir=recipe.output, **{**defaults, **recipe.trainer, "remove_unused_columns": False}
    )


def prepare_model(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """Freezes what the recipe does not train, or puts its adapter on the model."""
    if recipe.lora is None:
        train_only(model, recipe.train)
        return model
    return get_peft_model(model, lora_config(model, **recipe.lora))


def last_whole_checkpoint(output: Path) -> Path | None:
    """The checkpoint with the highest step whose writing was not cut off; None where there is none."""
    steps = {
        int(folder.name.rsplit("-", 1)[1]): folder
        for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rsplit("-", 1)[1].isdigit()
    }
    for step in sorted(steps, reverse=True):
        try:
            json.loads((steps[step] / STATE_FILE).read_text())
        except (OSError, ValueError):
            continue
        return steps[step]
    return None


def _claim(output: Path, recipe: Recipe, resume: bool) -> None:
    """Makes the output folder this recipe's. Raises ValueError where it belongs to another run."""
    file = output / RECIPE_FILE
    if file.is_file():
        previous = json.loads(file.read_text())
        current = recipe.identity()
        differing = sorted(key for key in previous | current if previous.get(key) != current.get(key))
        if not resume:
            raise ValueError(f"output: {output} holds a run; pass --resume to go on with it, or give another folder")
        if differing:
            raise ValueError(f"output: {output} holds a run of another recipe, they differ in {', '.join(differing)}")
        whole = last_whole_checkpoint(output)
        for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if whole is None or _step(folder) > _step(whole):
                # Cut off while it was written.
                shutil.rmtree(folder)
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output: {output} is not empty and holds no run; give another folder")
    output.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(recipe.identity(), indent=2))
    partial.rename(file)


def _step(folder: Path) -> int:
    number = folder.name.rsplit("-", 1)[1]
    return int(number) if number.isdigit() else -1


def _starting_point(recipe: Recipe, processor: Any, output: Path, state: PartialState) -> str:
    """The folder of the model to train; where it is made sparse first, a new one, which an adapter can refer to later."""
    if recipe.experts is None and recipe.upcycle is None:
        return recipe.model
    folder = output / "assembled"
    if state.is_main_process and not folder.is_dir():
        if recipe.experts is None:
            model = AutoModelForMultimodalLM.from_pretrained(recipe.model, dtype=recipe.dtype)
        else:
            arguments = dict(recipe.experts)
            copies = arguments.pop("copies", 0)
            experts = arguments.pop("from", None) or [recipe.model] * copies
            model = assemble_experts(recipe.model, experts, dtype=recipe.dtype, **arguments)
        if recipe.upcycle is not None:
            upcycle(model, **recipe.upcycle)
        _write_whole(folder, model, processor)
    state.wait_for_everyone()
    return str(folder)


def _save(model: PreTrainedModel | PeftModel, processor: Any, output: Path) -> None:
    if isinstance(model, PeftModel):
        _write_whole(output / "adapter", model)
        model = model.merge_and_unload()
    _write_whole(output / "model", model, processor)


def _write_whole(folder: Path, model: PreTrainedModel | PeftModel, processor: Any = None) -> None:
    """Saves beside the folder and then gives it its name, so that a folder of that name is always whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    if processor is not None:
        processor.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
