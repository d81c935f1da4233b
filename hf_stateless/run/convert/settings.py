"""The values of a config by their dotted names: what was not asked for is left over, so that nothing is lost."""

from __future__ import annotations

from typing import Any


class Settings:
    """Values of nested mappings, each handed out once.

    Args:
        values: the mappings.
        names: what a dotted name is called in the person's own file, where that differs.

    Example:
        >>> from hf_stateless.run.convert.settings import Settings
        >>> settings = Settings({"fp16": {"enabled": "auto", "loss_scale": 0}, "gradient_clipping": 1})
        >>> settings.switch("fp16.enabled"), settings.number("gradient_clipping"), settings.autos, settings.left()
        ('auto', 1, ['fp16.enabled'], {'fp16.loss_scale': 0})
    """

    def __init__(self, values: dict[str, Any], names: dict[str, str] | None = None) -> None:
        self._given = dict(_leaves(values))
        self._values = dict(self._given)
        self._names = names or {}
        self.autos: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._given or any(name.startswith(f"{key}.") for name in self._given)

    def is_off(self, key: str) -> bool:
        """Return whether a block that a value stands in has `enabled: false`."""
        parts = key.split(".")
        blocks = (".".join(parts[:length]) for length in range(1, len(parts)))
        return any(self._given.get(f"{block}.enabled") in (False, "false") for block in blocks)

    def name(self, key: str) -> str:
        """Return what a person calls it."""
        return self._names.get(key, key)

    def take(self, key: str, *, default: Any = None) -> Any:
        """Return a value and forget it; None where there is none.

        What is "auto" is remembered as a value of TrainingArguments, or is `default` where that is given.
        """
        value = self._values.pop(key, None)
        if value == "auto":
            if default is not None:
                return default
            self.autos.append(self.name(key))
        return value

    def left(self) -> dict[str, Any]:
        """Return what nobody has taken."""
        return dict(self._values)

    def expect_blocks(self, *keys: str) -> None:
        """Take what is an empty block, or none.

        Raises:
            ValueError: one of them is a single value.
        """
        for key in keys:
            value = self._values.pop(key, None)
            if value not in (None, {}):
                raise ValueError(f"{self.name(key)}: got {value!r}, expected a block of settings, {{...}}")

    def switch(self, key: str) -> bool | str | None:
        """Take what is true, false, "auto" or absent.

        Raises:
            ValueError: it is something else.
        """
        value = self.take(key)
        if value is None or isinstance(value, bool):
            return value
        if value == "auto":
            return "auto"
        known = {"true": True, "false": False, "1": True, "0": False}.get(str(value).lower())
        if known is None:
            raise ValueError(f"{self.name(key)}: got {value!r}, expected true, false or auto")
        return known

    def number(self, key: str, *, least: float = 0, whole: bool = False) -> float | None:
        """Take a number; None where it is absent or "auto".

        Raises:
            ValueError: it is no number, not a whole one, or below `least`.
        """
        value = self.take(key)
        if value is None or value == "auto" or str(value).lower() == "none":
            return None
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not least <= number < float("inf") or (whole and number != int(number)):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{self.name(key)}: got {value!r}, expected {kind} of at least {least}, or auto")
        return int(number) if whole or (isinstance(value, int) and number == value) else number


def _leaves(values: dict[Any, Any], above: str = "") -> list[tuple[str, Any]]:
    """Return the values of nested mappings with their dotted names; an empty mapping is a value."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{above}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return found
