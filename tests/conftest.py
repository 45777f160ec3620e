import torch

# Two cores are shared by everything that runs here; more threads only fight each other.
torch.set_num_threads(2)
