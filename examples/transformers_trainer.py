"""Prune a timm model in Hugging Face's transformers before its ``Trainer`` gets it.

    pip install 'transformers[torch]'
    python examples/transformers_trainer.py

Trains a small ResNet at 95 % sparsity on scikit-learn's handwritten digits, in
bfloat16, then goes on from a checkpoint in a new model. About fifteen seconds on two
cores.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from force_plugin import force_prune, make_permanent, sparsity_report
from force_plugin.zoo import Digits, digits


class Images(Dataset[dict[str, Tensor]]):
    """The digits as a Trainer takes them."""

    def __init__(self, images: Digits) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, target = self.images[index]
        return {"pixel_values": image, "labels": target}


def accuracy(prediction: Any) -> dict[str, float]:
    right = prediction.predictions.argmax(1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def make_trainer(model: torch.nn.Module, folder: str, epochs: int) -> Trainer:
    train, test = (Images(part) for part in digits(32))
    return Trainer(
        model,
        TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=20,
            bf16=True,
            use_cpu=True,
            save_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
    )


def main() -> None:
    set_seed(0)
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=10)
    model = TimmWrapperForImageClassification(config)
    batches = DataLoader(Images(digits(32)[0]), batch_size=64, shuffle=True)
    # These two statements are ours.
    force_prune(
        model,
        batches,
        0.95,
        steps=10,
        forward=lambda model, batch: model(**batch).loss,
        progress=False,
    )
    make_permanent(model)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, folder, epochs=4)
        trainer.train()
        print(f"accuracy {trainer.evaluate()['eval_accuracy']:.2%}")
        print(f"sparsity {sparsity_report(model).sparsity:.2%}")

        checkpoint = f"{folder}/checkpoint-{trainer.state.global_step}"
        model = TimmWrapperForImageClassification.from_pretrained(checkpoint)
        make_permanent(model)  # and this one, to hold the zeros once more
        trainer = make_trainer(model, folder, epochs=6)
        trainer.train(resume_from_checkpoint=checkpoint)
        print(f"resumed: accuracy {trainer.evaluate()['eval_accuracy']:.2%}")
        print(f"resumed: sparsity {sparsity_report(model).sparsity:.2%}")


if __name__ == "__main__":
    main()
