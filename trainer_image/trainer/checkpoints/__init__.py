"""The checkpoint format: names, metadata, reading that trusts nothing, snapshots of a run."""
