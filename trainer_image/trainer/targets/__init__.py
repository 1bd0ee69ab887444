"""The teacher's targets, made once: how they are drawn, stored and read."""
