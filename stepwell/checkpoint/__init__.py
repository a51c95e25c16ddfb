"""Checkpoints: one file in the safetensors format, matched by name, whole or not at all."""

from .convert import convert as convert
from .convert import from_torch as from_torch
from .convert import to_torch as to_torch
from .folder import latest as latest
from .header import CheckpointError as CheckpointError
from .loading import Loaded as Loaded
from .loading import load as load
from .reading import verify as verify
from .saving import Writing as Writing
from .saving import save as save

__all__ = [
    "CheckpointError",
    "Loaded",
    "Writing",
    "convert",
    "from_torch",
    "latest",
    "load",
    "save",
    "to_torch",
    "verify",
]
