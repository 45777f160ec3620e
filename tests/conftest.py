import os

import torch

# Two cores are shared by everything that runs here; more threads only fight each other.
torch.set_num_threads(2)
# Nor does the compiler start processes of its own, which take longer to start than the little that is compiled.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
