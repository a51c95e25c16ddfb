"""Pictures: schedules, and what the field's tutorials draw; each is a Matplotlib Figure."""

from .averages import forgetting as forgetting
from .descent import learning_rates as learning_rates
from .descent import momenta as momenta
from .schedules import schedule as schedule
from .surfaces import RAVINE as RAVINE
from .surfaces import ROSENBROCK as ROSENBROCK
from .surfaces import Surface as Surface
from .trajectories import trajectories as trajectories

__all__ = [
    "RAVINE",
    "ROSENBROCK",
    "Surface",
    "forgetting",
    "learning_rates",
    "momenta",
    "schedule",
    "trajectories",
]
