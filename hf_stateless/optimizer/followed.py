"""Tables whose rule nobody has asked for: a run that is resumed goes on with the rule of its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch


logger = logging.getLogger(__name__)

Otherwise = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""For the positions of some groups: what the group would hold under other rules, by their names."""
TABLE_OPTIONS = {"embedding": "embeddings", "head": "heads"}
"""The options that name the rules of tables, by the roles of these."""


def followed(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], otherwise: Otherwise
) -> list[dict[str, Any]]:
    """Return the groups of a run with the rules of a checkpoint, where the run has not asked for others.

    Args:
        groups: of the run; they are not changed.
        saved: those of the checkpoint.
        otherwise: the groups whose rule was not asked for, with what they may hold instead.

    Example:
        >>> from hf_stateless.optimizer.followed import followed
        >>> table = {"params": [], "role": "head", "algorithm": "row_moment", "lr": 0.1, "table_beta2": 0.99}
        >>> rules = {"row_moment": {"algorithm": "row_moment", "table_beta2": 0.99}}
        >>> otherwise = {0: {**rules, "adamw": {"algorithm": "adamw", "betas": (0.9, 0.999)}}}
        >>> followed([table], [{"params": [], "algorithm": "adamw"}], otherwise)
        [{'params': [], 'role': 'head', 'lr': 0.1, 'algorithm': 'adamw', 'betas': (0.9, 0.999)}]
    """
    every = [dict(group) for group in groups]
    if len(saved) != len(every):
        return every
    for position, rules in otherwise.items():
        algorithm, own = str(saved[position].get("algorithm")), every[position]
        if algorithm != own["algorithm"] and algorithm in rules:
            here = rules[own["algorithm"]]
            every[position] = {k: v for k, v in own.items() if k not in here} | dict(rules[algorithm])
    return every


def tell_followed(groups: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> None:
    """Log which rules of a checkpoint a run goes on with, if there are any that it would not have taken itself.

    Args:
        groups: from `followed`.
        before: the groups that it was given.
    """
    changed = [(now, old) for now, old in zip(groups, before, strict=True) if now["algorithm"] != old["algorithm"]]
    if changed:
        own = ", ".join(sorted({old["algorithm"] for _, old in changed}))
        told = said([now for now, _ in changed])
        logger.warning(
            "The checkpoint was written with %s, and its tables go on so, where a new run takes %s. "
            'Type optim_args="%s" to ask for it yourself.',
            told,
            own,
            told,
        )


def said(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the options that ask for the rules of the embeddings and heads among some groups; empty for none.

    Example:
        >>> from hf_stateless.optimizer.followed import said
        >>> said([{"role": "embedding", "algorithm": "adamw"}, {"role": "head", "algorithm": "multinorm"}])
        'embeddings=adamw,heads=stateless'
    """
    rules: dict[str, str] = {}
    for group in groups:
        role = str(group.get("role"))
        if role in TABLE_OPTIONS and rules.get(role) in (None, "adamw"):  # biases of heads have that too
            rules[role] = "stateless" if group["algorithm"] == "multinorm" else group["algorithm"]
    if rules.get("head") == rules.get("embedding"):
        rules.pop("head", None)
    return ",".join(f"{TABLE_OPTIONS[role]}={rules[role]}" for role in TABLE_OPTIONS if role in rules)


def without_others(
    state_dict: Mapping[str, Any], made: Mapping[Any, Mapping[str, Any]], otherwise: Otherwise
) -> dict[str, Any]:
    """Return a state dict without what other rules of its tables would keep.

    torch adds what it saved under FSDP2 to a state that it had an optimizer make before.

    Args:
        state_dict: a checked one.
        made: what the rules keep, by the number that the state dict has for a parameter.
        otherwise: the groups whose rule was not asked for.
    """
    state = dict(state_dict["state"])
    for i in (i for position in otherwise for i in state_dict["param_groups"][position]["params"] if i in state):
        state[i] = {name: tensor for name, tensor in state[i].items() if name in made[i]}
    return {**state_dict, "state": state}


def follow_(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Give the tables of an optimizer whose rule was not asked for that of a checkpoint, in place, and say so.

    Args:
        optimizer: with `otherwise`; what it keeps for tables that change is dropped.
        saved: the groups of the checkpoint.
    """
    before = [dict(group) for group in optimizer.param_groups]
    groups = followed(before, saved, getattr(optimizer, "otherwise", {}))
    for group, old, now in zip(optimizer.param_groups, before, groups, strict=True):
        if now["algorithm"] != old["algorithm"]:
            group.clear()
            group.update(now)
            for p in group["params"]:
                optimizer.state.pop(p, None)
    tell_followed(groups, before)
