"""A drop-in replacement for torch.optim: `import stepwell as optim`."""

from . import lr_scheduler as lr_scheduler
from .optimizer import LoadReport as LoadReport
from .optimizer import Optimizer as Optimizer
from .optimizer import compose as compose
from .optimizers import SGD as SGD
from .optimizers import Adam as Adam
from .optimizers import AdamW as AdamW
