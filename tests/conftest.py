"""Settings that every test shares: reproducible examples and one thread per process."""

import torch
from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("reproducible")

torch.set_num_threads(1)
