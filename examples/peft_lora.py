"""LoRA on attention and MLPs with PEFT and transformers' Trainer; merged, saved, loaded again."""

import tiny
from peft import LoraConfig, get_peft_model
from trainer import PackedTrainer
from transformers import TrainingArguments

import fastvlm
from fastvlm.florenz import FlorenzForConditionalGeneration
from fastvlm.packing import PackingCollator

# of the encoder's and the decoder's layers alone: the vision tower has an fc1 and an fc2 as well
LAYERS = (
    r".*(encoder|decoder)\.layers\..*"
    r"\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
)


def main(folder: str = "peft-lora") -> list[float]:
    model = get_peft_model(tiny.model(), LoraConfig(r=8, lora_alpha=32, target_modules=LAYERS))
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    settings = TrainingArguments(
        folder, num_train_epochs=6, learning_rate=0.02, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True,
    )  # fmt: skip
    run = PackedTrainer(model, settings, collator, tiny.samples())
    run.train()
    model.save_pretrained(f"{folder}/adapter")
    model.merge_and_unload().save_pretrained(f"{folder}/merged")
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def load(folder: str = "peft-lora") -> FlorenzForConditionalGeneration:
    """The merged weights, as a model without adapters, which runs on all of fastvlm's ops."""
    model = FlorenzForConditionalGeneration.from_pretrained(f"{folder}/merged")
    fastvlm.patch(model)
    return model


if __name__ == "__main__":
    print(main())
    print(load().device)
