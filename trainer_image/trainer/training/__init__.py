"""A training run: where it starts, its loop, its step, its evaluations."""
