"""Kernels from the Hub, or from a folder in its layout, by the package `kernels`: only where they are asked for."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

HUB = "hub:"
"""What the value of `HF_STATELESS_KERNELS` begins with."""


def chosen_on_hub(place: str, *matrices: Any) -> Any:
    """Return the kernel that those of a place choose for some matrices, or None where they have none.

    Args:
        place: `OWNER/NAME`, `OWNER/NAME@VERSION`, or a folder.
        matrices: what `hf_stateless.update.kernels.choice.choose` takes.
    """
    module = _loaded(place)
    return module.choose(*matrices) if module is not None else None


@cache
def _loaded(place: str) -> Any:
    """Return the module of a place; None, with one line, where there is none: a training goes on without it."""
    try:
        import kernels

        if os.path.isdir(place):
            module = kernels.get_local_kernel(Path(place))
        else:
            name, _, version = place.partition("@")
            # Whoever names a repository here lets its code run.
            module = kernels.get_kernel(name, version=int(version or 1), trust_remote_code=[name])
        if not callable(getattr(module, "choose", None)):
            raise AttributeError("it has no choose(weights, grads, chain, layout)")
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("No kernels from %s, so those of this package are used: %s", place, said)
        return None
    logger.info("Kernels from %s.", place)
    return module
