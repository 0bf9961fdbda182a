"""Training: what Megatron's loop is given, and what is checked before it starts."""

from hymeg import platform

platform.install()
