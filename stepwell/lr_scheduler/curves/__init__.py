"""Curves: pure functions of the step, and how they are joined."""

from .composition import Curve as Curve
from .composition import Product as Product
from .composition import Scaled as Scaled
from .composition import Then as Then
from .constant import constant as constant
from .cosine import cosine as cosine
from .cosine_restarts import cosine_restarts as cosine_restarts
from .cosine_wave import cosine_wave as cosine_wave
from .cyclic import cyclic as cyclic
from .exponential import exponential as exponential
from .inverse_sqrt import inverse_sqrt as inverse_sqrt
from .linear import linear as linear
from .multi_step import multi_step as multi_step
from .one_cycle import one_cycle as one_cycle
from .polynomial import polynomial as polynomial
from .rex import rex as rex
from .step import step as step
from .warmup import warmup as warmup
from .warmup_stable_decay import warmup_stable_decay as warmup_stable_decay
