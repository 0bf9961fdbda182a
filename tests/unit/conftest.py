"""Tests may import Megatron at their top, in any order: the platform comes first."""

from hymeg import platform

platform.install()
