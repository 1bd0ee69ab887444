"""The GPU training core: knowledge distillation of a causal language model.

Imports nothing of Kubeflow or Vertex AI; ``components`` and ``pipelines`` are built on it.
"""

import time as _time

__version__ = "0.1.0"

STARTED = _time.monotonic()
"""When this package was imported, by `time.monotonic`."""
