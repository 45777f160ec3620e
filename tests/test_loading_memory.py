"""Loading a model takes hardly more host memory than the model itself, whatever its file holds: measured on 1 GB files.

A process of its own loads the model, while a thread of it watches how much anonymous memory it has. Tensors in the
dtype of their file stay views of it: the model keeps nothing of them in memory.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.checkout import ENVIRONMENT, ROOT
from tests.tiny import TINY_SHAPE
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5Encoder

FP32, FP16, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
SMALLEST_FILE = 10**9
LOAD = """
import gc, json, re, sys, threading, time
import torch
from pathlib import Path
from utils.storage.load import Store
from utils.storage.weights import QUANTISED, Storage
from wan.checkpoints import build_transformer, cast_to, load_transformer, read_weights
from wan.checkpoints.load import _load
from wan.checkpoints.parts import build_text_encoder
from wan.checkpoints.transformer import read_transformer

part, path, target = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
dtype = torch.bfloat16 if target in QUANTISED else getattr(torch, target)

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

done, peak = threading.Event(), [0]
files = read_transformer(path) if part == "transformer" else read_weights(path, part)
torch.ones(1024, 1024).to(torch.bfloat16) @ torch.ones(1024, 1024).to(torch.bfloat16)
gc.collect()
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
if target in QUANTISED:
    model = build_transformer(files)
    Store(Storage(torch.device("cpu"), dtype, target)).load(model, files, cast_to)
elif part == "transformer":
    model = load_transformer(files, dtype)
else:
    model = _load(build_text_encoder(files), files, "cpu", dtype)
done.set()
thread.join()
maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path.name)]
mapped = [range(*(int(end, 16) for end in words[0].split("-"))) for words in maps]
tensors = list(model.state_dict().values())
kept = sum(tensor.nbytes for tensor in tensors if not any(tensor.data_ptr() in pages for pages in mapped))
largest = max(tensor.nbytes for tensor in tensors)
print(json.dumps({"beyond": peak[0] - before - kept, "kept": kept, "largest": largest, "peak": peak[0] - before}))
"""


def transformer(layers: int) -> nn.Module:
    """A transformer of 67 million parameters for each layer."""
    shape = replace(TINY_SHAPE, dim=2048, ffn_dim=8192, num_heads=16, num_layers=layers)
    with torch.device("meta"):
        return WanModel(shape)


def text_encoder() -> nn.Module:
    """The released vocabulary and width, whose embedding is the largest tensor of all, in one narrow block."""
    with torch.device("meta"):
        return UMT5Encoder(256384, 4096, dim_attn=64, dim_ffn=64, num_heads=1, num_layers=1)


def stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(tensor.shape, dtype=torch.bfloat16).to(dtype)


def write(path: Path, module: nn.Module, dtype: torch.dtype, scaled: bool = False) -> Path:
    state = {name: stored(name, tensor, dtype) for name, tensor in module.state_dict().items()}
    if scaled:
        weights = [name for name in state if name.endswith(".weight") and state[name].ndim == 2]
        state |= {f"{name.removesuffix('weight')}scale_weight": torch.tensor(0.5) for name in weights}
        state["scaled_fp8"] = torch.zeros(2).to(FP8)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    assert path.stat().st_size >= SMALLEST_FILE
    return path


def load(path: Path, part: str, target: str) -> dict[str, int]:
    """What a process sees that loads a part to a dtype, or to a format."""
    command = [sys.executable, "-c", LOAD, part, str(path), target]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("part", "build", "name", "dtype", "scaled"),
    [
        ("transformer", lambda: transformer(4), "fp32.safetensors", FP32, False),
        ("transformer", lambda: transformer(8), "bf16.safetensors", BF16, False),
        ("transformer", lambda: transformer(8), "fp16.safetensors", FP16, False),
        ("transformer", lambda: transformer(15), "fp8.safetensors", FP8, False),
        ("transformer", lambda: transformer(15), "fp8_scaled.safetensors", FP8, True),
        ("text_encoder", text_encoder, "bf16.pth", BF16, False),
        ("text_encoder", text_encoder, "fp8_scaled.safetensors", FP8, True),
    ],
)
def test_loading_takes_little_more_host_memory_than_the_model(
    tmp_path: Path, part: str, build: Callable[[], nn.Module], name: str, dtype: torch.dtype, scaled: bool, target: str
):
    path = write(tmp_path / name, build(), dtype, scaled)
    seen = load(path, part, target)
    kept, beyond = seen["kept"], seen["beyond"]
    facts = f"{part} {name} to {target}: the model keeps {kept / 1e9:.2f} GB, loading took {beyond / 1e9:.2f} GB more"
    print(f"{facts}, its largest tensor has {seen['largest'] / 1e9:.2f} GB")
    assert beyond <= 1.2 * seen["largest"] + 0.5e9, facts
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["int8", "fp8_scaled"])
def test_quantising_while_loading_takes_less_host_memory_than_the_file(tmp_path: Path, target: str):
    path = write(tmp_path / "bf16.safetensors", transformer(8), BF16)
    seen, size = load(path, "transformer", target), path.stat().st_size
    kept, peak = seen["kept"], seen["peak"]
    facts = f"{target} of {size / 1e9:.2f} GB: the model keeps {kept / 1e9:.2f} GB, the peak is {peak / 1e9:.2f} GB"
    print(facts)
    assert kept < 0.65 * size and peak <= 1.2 * size, facts
    path.unlink()
