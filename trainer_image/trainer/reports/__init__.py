"""What runs have recorded, as pages and texts for people."""
