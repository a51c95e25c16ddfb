"""transformers' Trainer with an optimizer of stepwell: train, stop, and resume."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import stepwell


class Counting(torch.utils.data.Dataset):
    """Numbers, each one more than the one before it."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        numbers = torch.arange(index, index + 8) % 32
        return {"input_ids": numbers, "labels": numbers}


def make_trainer(folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    arguments = TrainingArguments(
        folder, max_steps=40, save_steps=20, lr_scheduler_type="cosine", weight_decay=0.1
    )
    return Trainer(
        model,
        arguments,
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=(stepwell.AdamW, {"lr": 1e-2, "betas": (0.9, 0.95)}),
    )


with tempfile.TemporaryDirectory() as folder:
    through = make_trainer(folder)
    print(f"mean loss: {through.train().training_loss:.2f}")

    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-20")

weights = zip(through.model.parameters(), resumed.model.parameters(), strict=True)
print("resumed to the same weights:", all(torch.equal(a, b) for a, b in weights))
