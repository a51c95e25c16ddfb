"""Parameter groups by kind, by name, by depth; and a table of what went where."""

from ..param_groups import Times as Times
from .by_pattern import by_pattern as by_pattern
from .freezing import freeze as freeze
from .freezing import unfreeze as unfreeze
from .layerwise import layerwise_decay as layerwise_decay
from .muon_split import MuonSplit as MuonSplit
from .muon_split import muon_split as muon_split
from .no_decay import no_decay as no_decay
from .table import GroupTable as GroupTable
from .table import table as table

__all__ = [
    "GroupTable",
    "MuonSplit",
    "Times",
    "by_pattern",
    "freeze",
    "layerwise_decay",
    "muon_split",
    "no_decay",
    "table",
    "unfreeze",
]
