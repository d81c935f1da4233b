"""Plugins for frameworks that load them by a dotted name."""
