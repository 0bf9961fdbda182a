"""What a run would take before it is queued: FLOPs, memory, legal layouts. Arithmetic on `HyConfig`."""
