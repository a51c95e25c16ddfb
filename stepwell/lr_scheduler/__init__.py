"""Schedules: curves, each a pure function of the step, behind torch's stateful interface."""

from .curves import Curve as Curve
from .curves import Product as Product
from .curves import Scaled as Scaled
from .curves import Then as Then
from .curves import constant as constant
from .curves import cosine as cosine
from .curves import cosine_restarts as cosine_restarts
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
from .parse import parse as parse
from .scheduler import CurveLR as CurveLR
from .scheduler import LRScheduler as LRScheduler
from .steplr import StepLR as StepLR
