"""KFP components, one a file, each a few lines around a stage of ``trainer``."""
