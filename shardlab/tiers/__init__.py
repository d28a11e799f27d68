"""Where bytes live."""

from shardlab.tiers.memory import allocate

__all__ = ["allocate"]
