"""Schedules of the learning rate: each a pure function of the step, behind torch's interface."""

from .scheduler import Curve as Curve
from .scheduler import LRScheduler as LRScheduler
from .steplr import StepLR as StepLR
