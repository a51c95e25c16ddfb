"""What a rule may say: hyperparameters with ranges, state, and the functions of a formula."""

from .fields import AtFirst as AtFirst
from .fields import Decay as Decay
from .fields import Message as Message
from .fields import NonNegative as NonNegative
from .fields import OwnFlag as OwnFlag
from .fields import Positive as Positive
from .fields import Range as Range
from .fields import Real as Real
from .fields import Share as Share
from .fields import Switch as Switch
from .fields import Unlisted as Unlisted
from .fields import count as count
from .fields import fixed as fixed
from .fields import full as full
from .fields import unset as unset
from .fields import zeros as zeros
from .functions import amax as amax
from .functions import atan2 as atan2
from .functions import clamp as clamp
from .functions import epsilon as epsilon
from .functions import exp as exp
from .functions import floor as floor
from .functions import isfinite as isfinite
from .functions import lerp as lerp
from .functions import log as log
from .functions import maximum as maximum
from .functions import mean as mean
from .functions import minimum as minimum
from .functions import norm as norm
from .functions import numel as numel
from .functions import rsqrt as rsqrt
from .functions import sign as sign
from .functions import sqrt as sqrt
from .functions import square as square
from .functions import sum as sum
from .functions import where as where
from .program import Formula as Formula
from .program import Program as Program
from .program import program_for as program_for
from .program import trace as trace
from .transforms import L2 as L2
from .transforms import Average as Average
from .transforms import ClipNorm as ClipNorm
from .transforms import ClipValue as ClipValue
from .transforms import DecoupledDecay as DecoupledDecay
from .transforms import Maximize as Maximize
from .transforms import Scale as Scale
from .transforms import Transform as Transform
from .transforms import Unscale as Unscale
from .transforms import compose as compose

# the words of a rule; what traces and runs them is imported by its name
__all__ = [
    "L2",
    "AtFirst",
    "Average",
    "ClipNorm",
    "ClipValue",
    "Decay",
    "DecoupledDecay",
    "Maximize",
    "Message",
    "NonNegative",
    "OwnFlag",
    "Positive",
    "Range",
    "Real",
    "Scale",
    "Share",
    "Switch",
    "Transform",
    "Unlisted",
    "Unscale",
    "amax",
    "atan2",
    "clamp",
    "compose",
    "count",
    "epsilon",
    "exp",
    "fixed",
    "floor",
    "full",
    "isfinite",
    "lerp",
    "log",
    "maximum",
    "mean",
    "minimum",
    "norm",
    "numel",
    "rsqrt",
    "sign",
    "sqrt",
    "square",
    "sum",
    "unset",
    "where",
    "zeros",
]
