"""Schedules: curves, each a pure function of the step, behind torch's stateful interface."""

from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING as EPOCH_DEPRECATION_WARNING

from .chainedscheduler import ChainedScheduler as ChainedScheduler
from .constantlr import ConstantLR as ConstantLR
from .cosineannealinglr import CosineAnnealingLR as CosineAnnealingLR
from .cosineannealingwarmrestarts import CosineAnnealingWarmRestarts as CosineAnnealingWarmRestarts
from .curvelr import CurveLR as CurveLR
from .curves import Curve as Curve
from .curves import Product as Product
from .curves import Scaled as Scaled
from .curves import Then as Then
from .curves import constant as constant
from .curves import cosine as cosine
from .curves import cosine_restarts as cosine_restarts
from .curves import cosine_wave as cosine_wave
from .curves import cyclic as cyclic
from .curves import exponential as exponential
from .curves import inverse_sqrt as inverse_sqrt
from .curves import linear as linear
from .curves import multi_step as multi_step
from .curves import one_cycle as one_cycle
from .curves import polynomial as polynomial
from .curves import rex as rex
from .curves import step as step
from .curves import warmup as warmup
from .curves import warmup_stable_decay as warmup_stable_decay
from .cycliclr import CyclicLR as CyclicLR
from .exponentiallr import ExponentialLR as ExponentialLR
from .lambdalr import LambdaLR as LambdaLR
from .linearlr import LinearLR as LinearLR
from .multiplicativelr import MultiplicativeLR as MultiplicativeLR
from .multisteplr import MultiStepLR as MultiStepLR
from .onecyclelr import OneCycleLR as OneCycleLR
from .parse import parse as parse
from .polynomiallr import PolynomialLR as PolynomialLR
from .reducelronplateau import ReduceLROnPlateau as ReduceLROnPlateau
from .schedule import Schedule as Schedule
from .schedule import absolute as absolute
from .scheduler import LRScheduler as LRScheduler
from .scheduler import _LRScheduler as _LRScheduler
from .sequentiallr import SequentialLR as SequentialLR
from .steplr import StepLR as StepLR
from .swalr import SWALR as SWALR

__all__ = [
    "SWALR",
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "Curve",
    "CurveLR",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "Product",
    "ReduceLROnPlateau",
    "Scaled",
    "Schedule",
    "SequentialLR",
    "StepLR",
    "Then",
    "absolute",
    "constant",
    "cosine",
    "cosine_restarts",
    "cosine_wave",
    "cyclic",
    "exponential",
    "inverse_sqrt",
    "linear",
    "multi_step",
    "one_cycle",
    "parse",
    "polynomial",
    "rex",
    "step",
    "warmup",
    "warmup_stable_decay",
]
