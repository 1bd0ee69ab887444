"""KFP components, one a file, each a few lines around a stage of ``trainer``.

They run from the trainer image, which holds ``trainer`` and ``kfp``: nothing is installed when a
task starts. Inputs hold no time and no job id, so that an unchanged task is found in the cache.
"""

IMAGE = "liquid-annealing/trainer:local"
"""Stands for the trainer image until `pipelines.anneal` puts in the one that settings name."""
