"""The record of a run beside its checkpoints, ``metrics.jsonl``: its lines, written and read."""
