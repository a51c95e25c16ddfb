"""timm's optimizer factory, one of its models and one of its schedulers, with stepwell's AdamW."""

from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2

import stepwell

# wherever timm's factory would take a class of torch.optim, it takes stepwell's
for name in list_optimizers():
    info = default_registry.get_optimizer_info(name)
    if getattr(info.opt_class, "__module__", "").startswith("torch.optim."):
        rule = getattr(stepwell, info.opt_class.__name__)
        default_registry.register(replace(info, opt_class=rule))

torch.manual_seed(0)
model = VisionTransformer(16, 4, embed_dim=32, depth=2, num_heads=2, num_classes=4)
optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)
scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=8, warmup_epochs=2)
assert type(optimizer) is stepwell.AdamW

labels = torch.arange(64) % 4
images = torch.randn(64, 3, 16, 16) + labels.view(-1, 1, 1, 1)
for epoch in range(epochs):
    for some, few in zip(images.split(16), labels.split(16), strict=True):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(some), few)
        loss.backward()
        optimizer.step()
    scheduler.step(epoch + 1)
print(f"{len(optimizer.param_groups)} groups, loss: {loss.item():.2f}")
