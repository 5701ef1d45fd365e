"""Runs a recipe: one stage of Uni-MoE's, MoE-LLaVA's or CuMo's training, with `transformers.Trainer` as the loop."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    DistributedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks, is_tensorboard_available
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import trainer_log_levels
from transformers.utils import logging

from ..modeling_unimoe.configuration_unimoe import UniMoEConfig
from ..upcycling import upcycle
from .collator import MultimodalCollator
from .data import ConversationDataset
from .lora import lora_config
from .parts import can_change, train_only
from .recipe import Recipe
from .records import DataError
from .trainer import ModalityTrainer
from .upcycling import assemble_experts, open_weights

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

    Where it fails before its first step, the output is left as it was found.

    Raises:
        DataError: the data cannot be trained on.
        ValueError: the output holds another run, the model or an expert's checkpoint does not fit, or an argument is wrong.
    """
    output = Path(recipe.output)
    _check_model(recipe)
    arguments = training_arguments(recipe)
    # After the arguments, which decide on the devices and the backend.
    state = PartialState()
    _check_processes(recipe, arguments, state, resume)
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
    if not can_change(recipe.train, train_data.media_kinds()):
        logger.warning(f"train: no record goes through {', '.join(recipe.train)}, which will stay as it is")
    is_fresh = state.is_main_process and _claim(output, recipe, resume, state.num_processes)
    state.wait_for_everyone()
    trainer = None
    try:
        # Before any weight is drawn: those of adapters and routers depend on it.
        set_seed(arguments.seed)
        base = _starting_point(recipe, processor, output, state)
        sharding = None if recipe.distributed is None else DistributedConfig(**recipe.distributed)
        model = AutoModelForMultimodalLM.from_pretrained(base, dtype=recipe.dtype, distributed_config=sharding)
        model = prepare_model(model, recipe)
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
        with all_layers(model) if sharding is not None or trainer.is_fsdp_enabled else nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except Exception as error:
        # A recipe that could not do a step is corrected and started again, not resumed.
        if is_fresh and (trainer is None or trainer.state.global_step == 0):
            _release(output)
        if isinstance(error, DataError):
            # Of a data loader's worker it ends a traceback in text form.
            raise DataError(str(error).rstrip().rsplit(f"{DataError.__name__}: ", 1)[-1]) from None
        raise
    save_run(trainer, base, processor, output)
    train_data.share_marks(arguments.device)
    if state.is_main_process:
        for kind, count in train_data.counts().items():
            if count:
                print(f"{count} of {len(train_data)} records: {kind.replace('_', ' ')}")
    state.wait_for_everyone()
    return output / "model"


def _check_model(recipe: Recipe) -> None:
    """Raises ValueError or OSError where the recipe's model is no whole checkpoint of this package."""
    folder = Path(recipe.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {folder} has no config.json; give the folder of a checkpoint")
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind != UniMoEConfig.model_type:
        raise ValueError(f"model: {folder} is a {kind!r} checkpoint, not a UniMoE one; convert it first")
    for file in sorted(folder.glob("*.safetensors")):
        open_weights(file)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's `TrainingArguments`, which log to TensorBoard where it is installed unless told otherwise."""
    defaults: dict[str, Any] = {
        "report_to": "tensorboard" if is_tensorboard_available() else "none",
        "prediction_loss_only": True,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        # Trainer cannot save the optimizer of weights that were sharded when they were loaded.
        "save_strategy": "steps" if recipe.distributed is None else "no",
    }
    # The collator takes samples, of which Trainer knows no columns.
    fields = {**defaults, **recipe.trainer, "remove_unused_columns": False}
    try:
        arguments = TrainingArguments(output_dir=recipe.output, **fields)
        _check_arguments(arguments)
    except TypeError as error:
        # Of a mapping with a field that nothing knows.
        raise ValueError(f"trainer: {error}") from None
    return arguments


def _check_arguments(arguments: TrainingArguments) -> None:
    """Raises what Trainer itself would raise, but only once the model is loaded."""
    for name in ("log_level", "log_level_replica"):
        if getattr(arguments, name) not in trainer_log_levels:
            raise ValueError(f"trainer: {name!r} must be one of {', '.join(trainer_log_levels)}")
    for reporter in get_reporting_integration_callbacks(arguments.report_to):
        try:
            reporter()
        except RuntimeError as error:
            raise ValueError(f"trainer: report_to: {error}") from None
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    warmup, options = arguments.get_warmup_steps(1), arguments.lr_scheduler_kwargs
    get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, 1, options)


def _check_processes(recipe: Recipe, arguments: TrainingArguments, state: PartialState, resume: bool) -> None:
    """Raises ValueError where these processes cannot do what the recipe says."""
    if arguments.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
        # It would train a whole copy in each process, without a word.
        raise ValueError(
            f"trainer: fsdp works on GPUs only; on CPU write 'distributed: {{fsdp_size: {state.num_processes}}}' instead"
        )
    if recipe.distributed is None:
        return
    sharding = DistributedConfig(**recipe.distributed)
    needed = sharding.dp_size * sharding.tp_size * sharding.pp_size
    if needed != state.num_processes:
        raise ValueError(f"distributed: made for {needed} processes, but this run has {state.num_processes}")
    if resume:
        raise ValueError("distributed: Trainer cannot resume a run whose weights are sharded when they are loaded")


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


def _claim(output: Path, recipe: Recipe, resume: bool, num_processes: int) -> bool:
    """Makes the output folder this recipe's; says whether it was nobody's before, and empty.

    Raises ValueError where it belongs to another run.
    """
    file = output / RECIPE_FILE
    if file.is_file():
        previous = json.loads(file.read_text())
        current = recipe.identity(num_processes)
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
        return False
    partial = file.with_suffix(".partial")
    # Alone it is what a run has left that was killed here.
    if output.exists() and any(entry != partial for entry in output.iterdir()):
        raise ValueError(f"output: {output} is not empty and holds no run; give another folder")
    output.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(recipe.identity(num_processes), indent=2))
    partial.rename(file)
    return True


def _release(output: Path) -> None:
    """Undoes the claim of a folder that was empty. It stays where it is, as it may be a link."""
    for entry in output.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


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


@contextmanager
def all_layers(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """No LayerDrop inside: where weights are sharded, a layer that one process skips would leave the others waiting."""
    audio = model.config.audio_config
    layerdrop = None if audio is None else audio.layerdrop
    if audio is not None:
        audio.layerdrop = 0.0
    try:
        yield
    finally:
        if audio is not None:
            audio.layerdrop = layerdrop


def save_run(trainer: Trainer, base: str, processor: Any, output: Path) -> None:
    """Writes `<output>/model` and with an adapter `<output>/adapter`, whole, from weights that may be sharded.

    Every process must call it.

    Args:
        trainer: after training.
        base: folder of the model that an adapter belongs to.
        processor: saved beside the model.
        output: folder of the run.
    """
    model, state = trainer.accelerator.unwrap_model(trainer.model), PartialState()
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_distributed_loading_by_transformers:
        # All processes give their shards; the first one writes.
        _write_whole(output / "model", model, processor, is_main_process=state.is_main_process)
    elif state.is_main_process and not isinstance(model, PeftModel):
        _write_whole(output / "model", model, processor, state_dict=weights)
    elif state.is_main_process:
        _write_whole(output / "adapter", model, state_dict=weights)
        if weights is not None:
            # The weights at hand are shards.
            whole = AutoModelForMultimodalLM.from_pretrained(base, dtype=model.dtype)
            model = PeftModel.from_pretrained(whole, str(output / "adapter"))
        _write_whole(output / "model", model.merge_and_unload(), processor)
    state.wait_for_everyone()


def _write_whole(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    processor: Any = None,
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """Saves beside the folder and then gives it its name, so that a folder of that name is always whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    if is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, is_main_process=is_main_process, **kwargs)
    if not is_main_process:
        return
    if processor is not None:
        processor.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
