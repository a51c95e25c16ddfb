"""A drop-in replacement for torch.optim: `import stepwell as optim`."""

from importlib import import_module
from typing import TYPE_CHECKING

from .after_import import after_import
from .averaging import averaged as averaged
from .averaging import averaged_weights as averaged_weights
from .combined import Combined as Combined
from .composing import compose as compose
from .optimizer import LoadReport as LoadReport
from .optimizer import Optimizer as Optimizer
from .optimizer import swap_in_optimizer_params_and_state as swap_in_optimizer_params_and_state
from .optimizers import ASGD as ASGD
from .optimizers import LBFGS as LBFGS
from .optimizers import SGD as SGD
from .optimizers import Adadelta as Adadelta
from .optimizers import Adafactor as Adafactor
from .optimizers import Adagrad as Adagrad
from .optimizers import Adam as Adam
from .optimizers import Adamax as Adamax
from .optimizers import AdamW as AdamW
from .optimizers import Muon as Muon
from .optimizers import NAdam as NAdam
from .optimizers import RAdam as RAdam
from .optimizers import RMSprop as RMSprop
from .optimizers import Rprop as Rprop
from .optimizers import SparseAdam as SparseAdam
from .version import __version__ as __version__

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Combined",
    "LoadReport",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "averaged",
    "averaged_weights",
    "checkpoint",
    "compose",
    "functional",
    "groups",
    "language",
    "lr_scheduler",
    "plot",
    "race",
    "swa_utils",
    "swap_in_optimizer_params_and_state",
]

if TYPE_CHECKING:
    from . import checkpoint as checkpoint
    from . import functional as functional
    from . import groups as groups
    from . import language as language
    from . import lr_scheduler as lr_scheduler
    from . import plot as plot
    from . import race as race
    from . import swa_utils as swa_utils
else:

    def __getattr__(name):
        """What an optimizer does without is imported when it is first asked for (PEP 562)."""
        if name in __all__:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_remedy(name)}")

    def __dir__():
        return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])

    def _remedy(name):
        """Say where a class is that is not here; Python itself suggests a similar spelling."""
        if not name[:1].isupper():
            return ""
        for module in ("lr_scheduler", "swa_utils"):
            if hasattr(import_module(f"{__name__}.{module}"), name):
                return f": it is stepwell.{module}.{name}"
        optimizers = import_module(f"{__name__}.optimizers")
        rules = ", ".join(rule for rule in __all__ if hasattr(optimizers, rule))
        return (
            f': its optimizers are {rules}; to write another, see the README, "A rule of your own"'
        )


after_import("torch.distributed.optim.utils", f"{__name__}.distributed")
