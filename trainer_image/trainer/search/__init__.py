"""A search of settings: its trials, their trainings and their ranking."""
