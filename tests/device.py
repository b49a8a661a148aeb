"""Where tests of kernels and of the engine put their tensors: on the host, unless TEST_DEVICE says `cuda`.

Each tensor is put there by name, not by torch's default device: that would also place what the code under test makes,
and so hide that it makes something in the wrong place.
"""

import os

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
BACKEND = {"cpu": "gloo", "cuda": "nccl"}[DEVICE]
"""Of process groups."""
