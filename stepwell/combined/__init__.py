"""Several optimizers, each with parameters of its own, behind one."""

from .combined import Combined as Combined

__all__ = ["Combined"]
