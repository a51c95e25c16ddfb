"""Train one task with several optimizers, measure them side by side, and draw the result."""

from .task import Task as Task

__all__ = [
    "Task",
]
