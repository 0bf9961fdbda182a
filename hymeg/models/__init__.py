"""The models: from config.json to Megatron's flags, layer specs and modules."""

from hymeg import platform

platform.install()
