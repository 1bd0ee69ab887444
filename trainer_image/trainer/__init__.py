"""The GPU training core: knowledge distillation of a causal language model.

Knows nothing of Kubeflow or Vertex AI; ``components`` and ``pipelines`` are built on it.
"""

__version__ = "0.1.0"
