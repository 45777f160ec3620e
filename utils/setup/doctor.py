"""What is installed on this machine, whether the model can be used, and the known problems of both."""

import importlib.metadata
import platform
import re
import shutil
from collections.abc import Callable, Iterator

import psutil
import torch

from utils.common.console import say
from utils.common.errors import UserError
from utils.common.formatting import format_table, readable_size
from utils.media.decoding import has_decord
from wan.checkpoints import CheckpointError, ModelFiles

PACKAGES = ("torch", "torchvision", "peft", "transformers", "diffusers", "safetensors", "av", "decord", "numpy")


def print_findings(open_model: Callable[[], ModelFiles]) -> None:
    """Prints a table of versions, devices and the model, and below it a sentence for each known problem.

    `open_model` opens the model of the options. Raises what it raises, after everything is printed.
    """
    try:
        model, error = open_model(), None
        said = f"{model.source}: {model.family.name}, with all its parts"
    except (CheckpointError, UserError) as refusal:
        error, said = refusal, "cannot be used: see the error below"
    rows = [("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")]
    rows += [(name, _version(name) or "not installed") for name in PACKAGES]
    rows += [("memory", f"{readable_size(psutil.virtual_memory().available)} free"), *_gpu()]
    kinds = {"flash": torch.backends.cuda.flash_sdp_enabled(), "cudnn": torch.backends.cuda.cudnn_sdp_enabled()}
    kinds["memory-efficient"] = torch.backends.cuda.mem_efficient_sdp_enabled()
    rows.append(("attention", f"torch's: {', '.join([*(name for name, on in kinds.items() if on), 'plain'])}"))
    rows.append(("disk", f"{readable_size(shutil.disk_usage('.').free)} free"))
    say(format_table(("what", "found"), [*rows, ("model", said)]))
    problems = [f"- {problem}" for problem in _warnings()]
    if problems or error is None:
        say("\n" + ("\n".join(problems) or "no known problems"))
    if error is not None:
        raise error


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "GPU", "none that this torch supports"
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no native bf16"
        name = torch.cuda.get_device_name(index)
        yield f"GPU {index}", f"{name}, {readable_size(free)} of {readable_size(total)} free, {bf16}"
    yield "CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def _warnings() -> Iterator[str]:
    gpu, cudnn = torch.cuda.is_available(), torch.backends.cudnn.version() or 0
    found = _numbers(_version("torch"))
    if gpu and found[:2] == (2, 9) and (found < (2, 9, 1) or cudnn < 91500):
        yield "torch 2.9 without cuDNN 9.15 encodes video ten times slower, in several times the memory: use torch 2.10"
    if gpu and 90800 <= cudnn < 91100:
        yield "cuDNN 9.8 to 9.10 compute wrong bf16 video convolutions; not used here, where the VAE runs in fp32"
    if (5,) <= _numbers(_version("transformers")) < (5, 2):
        yield "transformers 5.0 and 5.1 zero UMT5's embeddings; not used here, where UMT5 is this program's own"
    if not has_decord():
        yield "decord is not installed or cannot be loaded: PyAV decodes everything, which is somewhat slower"
    if not gpu:
        yield "without a GPU everything runs on the CPU: fine for Wan-Nano, impractical for the 1.3B model"
    elif platform.system() == "Windows":
        yield "on Windows a full GPU spills into host memory, which makes training ten times slower: see the README"


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", (version or "").split("+")[0])[:3])
