"""skorch with an optimizer and a schedule of stepwell, in a scikit-learn grid search."""

import numpy as np
import torch
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler

import stepwell

torch.manual_seed(0)
inputs = np.random.RandomState(0).randn(200, 8).astype(np.float32)
labels = (inputs[:, 0] > inputs[:, 1]).astype(np.int64)


class Network(torch.nn.Sequential):
    def __init__(self, width=16):
        super().__init__(torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))


net = NeuralNetClassifier(
    Network,
    criterion=torch.nn.CrossEntropyLoss,
    optimizer=stepwell.AdamW,
    optimizer__weight_decay=0.1,
    max_epochs=20,
    batch_size=20,
    train_split=None,
    verbose=0,
    callbacks=[LRScheduler(stepwell.lr_scheduler.CosineAnnealingLR, T_max=20)],
)
search = GridSearchCV(net, {"lr": [1e-4, 1e-2], "module__width": [8, 16]}, cv=2)
search.fit(inputs, labels)
print(f"best: {search.best_params_}, accuracy: {search.best_score_:.2f}")
