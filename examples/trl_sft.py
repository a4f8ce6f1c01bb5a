"""TRL's SFTTrainer on a patched Gemma-2, with prompts that are not trained on."""

from typing import Any

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def trainer(output_dir: str, **arguments: Any) -> SFTTrainer:
    """The model is patched before the trainer gets it: TRL puts its own forward over it."""
    settings = {"num_train_epochs": 4, "learning_rate": 0.01, "report_to": [], **arguments}
    return SFTTrainer(
        tiny.causal_model(),
        SFTConfig(output_dir, logging_steps=1, save_strategy="no", bf16=False, **settings),
        train_dataset=Dataset.from_list(tiny.texts()),
        processing_class=tiny.tokenizer(),
    )


def main(output_dir: str = "trl-sft") -> list[float]:
    run = trainer(output_dir, use_cpu=True)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
