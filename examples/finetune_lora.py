"""LoRA on attention and experts of a UniMoE model with your own JSON: plain Trainer, plain PEFT.

    python examples/finetune_lora.py train.json heldout.json [--model FOLDER] [--output FOLDER] [--steps N]

A record is {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt",
"value": "A cat."}]}, with "video", "audio", "speech" alike; paths start from the file's folder.
"""

import argparse

from peft import get_peft_model
from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer, TrainingArguments, set_seed

import unimoe
from unimoe.training.collator import MultimodalCollator
from unimoe.training.data import ConversationDataset
from unimoe.training.lora import lora_config, merge_adapter


def main() -> tuple[float, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("train")
    parser.add_argument("heldout")
    parser.add_argument("--model", default=unimoe.tiny_checkpoint())
    parser.add_argument("--output", default="finetuned")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()

    # Before the adapter's weights are drawn.
    set_seed(0)
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForMultimodalLM.from_pretrained(args.model)
    model = get_peft_model(model, lora_config(model, r=8, alpha=16, routers=True))
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            prediction_loss_only=True,
            # The data set gives samples, of which Trainer knows no columns.
            remove_unused_columns=False,
        ),
        train_dataset=ConversationDataset(args.train, processor),
        eval_dataset=ConversationDataset(args.heldout, processor),
        data_collator=MultimodalCollator(processor),
        processing_class=processor,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss: {before:.3f} before, {after:.3f} after")

    # The adapter alone, then merged into a folder that loads like any other checkpoint.
    model.save_pretrained(f"{args.output}/adapter")
    merge_adapter(model, f"{args.output}/merged", processor)
    return before, after


if __name__ == "__main__":
    main()
