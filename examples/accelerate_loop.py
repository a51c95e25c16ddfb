"""accelerate with an optimizer and a schedule of stepwell: accumulate, clip, save, and resume."""

import tempfile

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import stepwell

torch.manual_seed(0)
inputs = torch.randn(256, 8)
dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True))


def prepare():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = stepwell.AdamW(model.parameters(), lr=1e-2)
    schedule = stepwell.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    return accelerator.prepare(model, optimizer, schedule, DataLoader(dataset, batch_size=32))


def train(model, optimizer, schedule, batches, epochs):
    for _ in range(epochs):
        for inputs, sums in batches:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.mse_loss(model(inputs), sums)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return loss.item()


accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
parts = prepare()
train(*parts, epochs=5)
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    print(f"loss: {train(*parts, epochs=5):.4f}")
    end = [param.clone() for param in parts[0].parameters()]
    accelerator.load_state(folder)
train(*parts, epochs=5)

print("resumed to the same weights:", all(map(torch.equal, end, parts[0].parameters())))
