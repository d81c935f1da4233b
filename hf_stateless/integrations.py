"""The path under which configurations of axolotl name the plugin: `hf_stateless.integrations.axolotl.Plugin`."""

from pathlib import Path


__path__ = [str(Path(__file__).with_name("run"))]
