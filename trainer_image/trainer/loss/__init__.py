"""The distillation loss: its divergences, a reference in chunks of tokens, and the fused form."""
