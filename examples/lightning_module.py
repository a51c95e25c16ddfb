"""Lightning with an optimizer and a schedule of stepwell: train, stop, and resume."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import stepwell
from stepwell.lr_scheduler import Schedule, cosine, warmup

torch.manual_seed(0)
inputs = torch.randn(256, 8)
batches = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=32)


class Sums(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
        )

    def training_step(self, batch, index):
        inputs, sums = batch
        self.loss = torch.nn.functional.mse_loss(self.network(inputs), sums)
        return self.loss

    def configure_optimizers(self):
        optimizer = stepwell.AdamW(self.named_parameters(), lr=1e-2)
        schedule = Schedule(optimizer, lr=warmup(8) >> cosine(72))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


through, resumed = Sums(), Sums()
options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
pl.Trainer(**options, max_epochs=10).fit(through, batches)
print(f"loss: {through.loss.item():.4f}")

half = pl.Trainer(**options, max_epochs=5)
half.fit(Sums(), batches)
half.save_checkpoint("half.ckpt")
pl.Trainer(**options, max_epochs=10).fit(resumed, batches, ckpt_path="half.ckpt")

weights = zip(through.parameters(), resumed.parameters(), strict=True)
print("resumed to the same weights:", all(torch.equal(a, b) for a, b in weights))
