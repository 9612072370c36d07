"""The contract: a frozen layer with a slot (Site), what goes into the slot (Adapter), who builds it (Method). Imports torch only."""

from weft.core.adapter import Adapter, Mixture, masters
from weft.core.amounts import amount
from weft.core.devices import device_of
from weft.core.errors import FAILS, WeftError
from weft.core.layers import features, is_conv, is_conv1d, is_linear, is_sharded, logical, numbers
from weft.core.method import METHODS, PEFT, Method
from weft.core.names import by_pattern, matcher, several
from weft.core.replaced import Replaced
from weft.core.site import (
    SLOT,
    Around,
    Front,
    Site,
    Slot,
    activate,
    base_class,
    behind,
    check_open,
    close_site,
    modules,
    open_site,
    plain,
    sites,
    slot_of,
    unmerged,
)

__all__ = [
    "FAILS",
    "METHODS",
    "PEFT",
    "SLOT",
    "Adapter",
    "Around",
    "Front",
    "Method",
    "Mixture",
    "Replaced",
    "Site",
    "Slot",
    "WeftError",
    "activate",
    "amount",
    "base_class",
    "behind",
    "by_pattern",
    "check_open",
    "close_site",
    "device_of",
    "features",
    "is_conv",
    "is_conv1d",
    "is_linear",
    "is_sharded",
    "logical",
    "masters",
    "matcher",
    "modules",
    "numbers",
    "open_site",
    "plain",
    "several",
    "sites",
    "slot_of",
    "unmerged",
]
