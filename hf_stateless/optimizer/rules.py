"""The table of rules: a parameter group names one as its `algorithm`."""

from __future__ import annotations

from .adamw import ADAMW, ADAMW_8BIT
from .lora_product import LORA_PRODUCT
from .multinorm import MULTINORM
from .rule import Rule
from .sinkhorn_momentum import SINKHORN_MOMENTUM


RULES: dict[str, Rule] = {
    "multinorm": MULTINORM,
    "lora_product": LORA_PRODUCT,
    "adamw": ADAMW,
    "adamw_8bit": ADAMW_8BIT,
    "sinkhorn_momentum": SINKHORN_MOMENTUM,
}
