"""What blocks keep, and whether they are compiled, by the command line: every family, every strategy, and resuming."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_wan_lora
from tests.compiler import need_compiler
from tests.families import RELEASES, lora_files, turns
from tests.tiny import write_clips, write_model
from utils.adapters.lora_file import delta
from utils.adapters.lora_reader import read_lora
from utils.common.tensor_files import read_tensors
from utils.storage import streaming, weights
from utils.training import memory
from wan.configs import FAMILIES, Family

STRATEGIES = ("none", "selective", "full", "offload", "auto")
STEPS = 4
SMALL = (
    f"--base_res 64 96 --token_limit 60 --learning_rate 1e-2 --lora_rank 4 --cache_latents 2 --val_samples 0 "
    f"--checkpointing_steps {STEPS // 2} --cache_dir cache"
)


@pytest.fixture(params=RELEASES)
def family(request, tmp_path_factory, monkeypatch) -> Family:
    """A family, whose small model and clips are in the current folder."""
    folder = tmp_path_factory.mktemp(request.param)
    monkeypatch.chdir(folder)
    write_model(folder / "model", FAMILIES[request.param])
    write_clips(folder / "clips")
    return FAMILIES[request.param]


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """Models compute in bf16, and blocks that are not compiled are fused."""
    decide = memory.MemoryOptions.memory

    def fused(opts: memory.MemoryOptions, *more: object) -> memory.Memory:
        chosen = decide(opts, *more)
        return replace(chosen, fuse=not chosen.compile)

    monkeypatch.setattr(memory.MemoryOptions, "memory", fused)
    monkeypatch.setattr(weights, "compute_dtype", lambda _device: torch.bfloat16)


@pytest.fixture
def compiler() -> Iterator[None]:
    """A compiler that knows nothing of other tests."""
    need_compiler()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(family: Family, output: str, *more: str) -> list[dict[str, Tensor]]:
    """What each LoRA of a run adds to the weights, by layer; from high noise to low."""
    length = [f"--max_train_steps={STEPS}", *turns(family, 1)]
    flags = ["--dataset", "clips", "--pretrained_model_name_or_path", "model", *SMALL.split(), *length]
    train_wan_lora.main([*flags, "--output_dir", output, *more])
    (run,) = Path(output).iterdir()
    last = STEPS * len(family.experts)
    loras = [read_lora(path).pairs for path in lora_files(run, family, last)]
    return [{name: delta(pair) for name, pair in pairs.items()} for pairs in loras]


def distance(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> float:
    """The relative distance of two runs' results."""
    pairs = [(lora[name], other[name]) for lora, other in zip(some, others, strict=True) for name in lora]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


def final_state(output: str) -> dict[str, Tensor]:
    (run,) = Path(output).iterdir()
    return read_tensors(max((run / "checkpoints").glob("state-*")))[0]


def broken_off_and_resumed(family: Family, output: str, *more: str) -> dict[str, Tensor]:
    """The last state of a run that was lost after its first half, and resumed."""
    train(family, output, *more)
    (run,) = Path(output).iterdir()
    for path in (run / "checkpoints").glob(f"*-{STEPS * len(family.experts):08d}*"):
        path.unlink()
    train(family, output, *more, "--resume_from_checkpoint", "latest")
    return final_state(output)


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.families
def test_every_strategy_trains_the_same_lora(family):
    results = {name: train(family, name, "--gradient_checkpointing", name) for name in STRATEGIES}
    assert all(distance(result, results["none"]) == 0 for result in results.values())
    assert same(broken_off_and_resumed(family, "resumed", "--gradient_checkpointing", "offload"), final_state("none"))


@pytest.mark.families
def test_every_strategy_trains_the_same_lora_as_on_a_gpu(family, as_on_a_gpu):
    results = {name: train(family, name, "--gradient_checkpointing", name) for name in STRATEGIES}
    assert all(distance(result, results["none"]) == 0 for result in results.values())
    assert 0 < distance(train(family, "exact", "--fp32_stream"), results["none"]) < 0.1
    resumed = broken_off_and_resumed(family, "resumed", "--gradient_checkpointing", "selective")
    assert same(resumed, final_state("none"))


@pytest.mark.families
def test_compiled_blocks_train_almost_the_same_lora_and_resume_exactly(family, as_on_a_gpu, compiler):
    # Each strategy is compiled in one of the families.
    strategy = STRATEGIES[RELEASES.index(family.name) % len(STRATEGIES)]
    flags = ["--compile", "on", "--gradient_checkpointing", strategy]
    result = train(family, "compiled", *flags)
    assert 0 < distance(result, train(family, "eager", *flags, "--compile", "off")) < 0.1
    assert same(broken_off_and_resumed(family, "resumed", *flags), final_state("compiled"))


@pytest.mark.families
def test_swapped_blocks_train_the_same_lora_with_weights_of_any_format_and_resume_exactly(
    family, as_on_a_gpu, monkeypatch
):
    monkeypatch.setattr(streaming, "SLOTS", 1)  # the small models have two blocks: each makes room for the other
    train(family, "plain", "--gradient_checkpointing", "none")
    swapped = ["--blocks_to_swap", "2"]
    train(family, "swapped", "--gradient_checkpointing", "selective", *swapped)
    assert same(final_state("swapped"), final_state("plain"))

    # Each format is trained with in some of the families.
    format = weights.QUANTISED[RELEASES.index(family.name) % len(weights.QUANTISED)]
    flags = ["--weight_dtype", format, "--gradient_checkpointing", "full"]
    train(family, format, *flags)
    assert not same(final_state(format), final_state("plain"))
    assert same(broken_off_and_resumed(family, "resumed", *flags, *swapped), final_state(format))
