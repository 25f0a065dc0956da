from __future__ import annotations

import torch

# The networks are so small that threads only wait for each other.
torch.set_num_threads(1)

collect_ignore = ["benchmarks"]  # scripts that need the examples on the path
