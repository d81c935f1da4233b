"""Axolotl: `plugins: [hf_stateless.integrations.axolotl.Plugin]` makes the names valid as `optimizer:`.

Axolotl loads its plugins before it checks the configuration, and loading this one imports hf_stateless; nothing else
is needed. Options are written in `optim_args` as everywhere. Newer versions have a `sinkgd` of their own, which goes
first there; the one of hf_stateless is then `optimizer: multinorm` with
`optim_args: {norms: row_l2+col_l2, num_iterations: 5}`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Make the class `Plugin` when axolotl asks for it, so that this file can be imported without axolotl."""
    if name != "Plugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from axolotl.integrations.base import BasePlugin

    return type("Plugin", (BasePlugin,), {"__doc__": "Registers the names of hf_stateless by being loaded."})
