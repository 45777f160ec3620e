"""The expert that does not run waits on disk: the same numbers, in less memory, whatever interrupts the exchange."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_wan_lora
import utils.storage.on_disk
from tests.experts import A14B, ADAPTED, COND, HIGH, LOW, draw, held_pair, in_turns, load_pair, options, take_turns
from tests.loras import make_pair
from tests.tiny import TINY_SHAPE, write_clips, write_model
from tests.trainees import equal
from utils.adapters.beside import Chosen
from utils.adapters.lora_file import LoraFile
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError
from utils.common.options import run_script
from utils.common.tensor_files import read_tensors
from utils.storage.weights import Storage, linear_layers
from utils.training.experts import Experts
from wan.checkpoints import CheckpointError, ModelFiles, open_model
from wan.configs import FAMILIES

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.2-I2V-A14B", A14B))


def storage(format: str | None = None, streamed: int = 0, on_disk: bool = True) -> Storage:
    return Storage(CPU, FP32, format, num_streamed=streamed, idle_on_disk=on_disk)


# ----------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("streamed", [0, 1, 2])
@pytest.mark.parametrize("format", [None, "fp8", "int8", "nf4"])
def test_turns_give_the_numbers_of_experts_that_wait_in_main_memory_bit_for_bit(files, format, streamed):
    found = in_turns(files, storage(format, streamed))
    assert all(tensor.isfinite().all() for tensor in found)
    assert equal(found, in_turns(files, storage(format, on_disk=False)))


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> str:
    """The options of a run with a LoRA in the base model of both experts."""
    folder = tmp_path_factory.mktemp("loras")
    for name in (HIGH, LOW):
        pairs = {f"blocks.{block}.self_attn.q": make_pair((TINY_SHAPE.dim, TINY_SHAPE.dim)) for block in range(2)}
        write_lora(folder / f"speed_{name}.safetensors", LoraFile(pairs))
    return f"{ADAPTED} --fuse_lora {folder / 'speed.safetensors'}"


@pytest.mark.parametrize("streamed", [0, 1])
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_fused_lora_is_in_an_expert_whenever_it_comes_from_disk(files, fused, format, streamed):
    found = in_turns(files, storage(format, streamed), fused)
    assert equal(found, in_turns(files, storage(format, on_disk=False), fused))
    assert not equal(found, in_turns(files, storage(format)))


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
@pytest.mark.parametrize("streamed", [0, 1])
@pytest.mark.parametrize("format", [None, "fp8", "int8", "nf4"])
def test_loras_begin_with_the_same_numbers(files, format, streamed, dtype):
    begun = []
    for on_disk in (False, True):
        torch.manual_seed(0)
        _, adapters = load_pair(files, Storage(CPU, dtype, format, num_streamed=streamed, idle_on_disk=on_disk))
        begun.append([parameter for adapter in adapters.values() for parameter in adapter.parameters.values()])
    assert equal(*begun) and any(parameter.any() for parameter in begun[1][-2:])


def test_loras_that_act_in_previews_alone_act_on_whichever_expert_comes(files):
    pair = {"blocks.0.ffn.0": make_pair((TINY_SHAPE.ffn_dim, TINY_SHAPE.dim))}
    chosen = {name: [Chosen(LoraFile(pair), 1.0)] for name in (HIGH, LOW)}

    def previews(on_disk: bool) -> list[Tensor]:
        experts, _ = held_pair(files, storage(on_disk=on_disk))
        with torch.no_grad(), experts.beside(chosen):
            inside = [experts.predict(draw(), torch.tensor([t]), COND) for t in (999.0, 1.0, 999.0)]
        with torch.no_grad():
            return [*inside, experts.predict(draw(), torch.tensor([1.0]), COND)]

    assert equal(previews(True), previews(False))


# ------------------------------------------------------------------------------------------------------------ in memory


def memory_of(experts: Experts, name: str) -> int:
    """What the weights of an expert's blocks take, without those of its LoRA."""
    layers = linear_layers(experts.models[name]).items()
    found = {layer.weight.untyped_storage() for each, layer in layers if "lora_" not in each}
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def test_the_blocks_of_one_expert_at_a_time_are_in_memory(files, monkeypatch):
    experts, _ = held_pair(files, storage())
    one = memory_of(experts, HIGH)
    assert one > 100_000 and memory_of(experts, LOW) < 100
    during: list[int] = []
    own = utils.storage.on_disk.read_some

    def watched(*args: object) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in own(*args):
            during.append(memory_of(experts, HIGH) + memory_of(experts, LOW) + tensor.nbytes)
            yield name, tensor

    monkeypatch.setattr(utils.storage.on_disk, "read_some", watched)
    for coming, leaving in ((LOW, HIGH), (HIGH, LOW)):
        experts.activate(coming)
        assert memory_of(experts, coming) == one and memory_of(experts, leaving) < 100
    assert len(during) == 40 and max(during) < one + 200


def test_swapped_blocks_of_both_experts_have_one_memory_and_those_of_the_one_that_left_refer_to_no_slot(files):
    experts, _ = held_pair(files, storage("int8", streamed=1))
    high, low = experts._streams
    assert high.hosts is low.hosts
    layer = experts.models[LOW].blocks[0].ffn[0].get_base_layer()
    experts.activate(LOW)
    assert low.holds(layer.weight) and layer.weight.dtype == torch.int8
    experts.activate(HIGH)
    assert not low.holds(layer.weight) and layer.weight.isnan().all()


def test_what_comes_from_disk_is_read_for_each_exchange_and_never_for_the_expert_that_is_there(files, monkeypatch):
    reads: list[str] = []
    own = utils.storage.on_disk.read_some
    monkeypatch.setattr(utils.storage.on_disk, "read_some", lambda *args: reads.append("read") or own(*args))
    experts, _ = held_pair(files, storage())
    for name, count in ((HIGH, 0), (LOW, 1), (LOW, 1), (HIGH, 2)):
        experts.activate(name)
        assert len(reads) == count


@pytest.mark.parametrize("format", [None, "int8"])
def test_what_comes_from_disk_is_not_moved_and_all_else_is(files, format):
    experts, _ = held_pair(files, storage(format))
    for coming in (HIGH, LOW):
        experts.activate(coming)
        for name, model in experts.models.items():
            inner = {id(layer.weight) for each, layer in linear_layers(model).items() if "lora_" not in each}
            frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
            assert len(inner) == 20 and {id(tensor) for tensor in experts._base(name)} == frozen - inner


def test_a_bar_says_which_expert_is_read(files, capsys):
    held_pair(files, storage())[0].activate(LOW)
    assert "reading the low_noise expert" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- interrupted


@contextmanager
def interrupting(monkeypatch, after: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """Inside, the reading of an expert ends after so many tensors."""
    own = utils.storage.on_disk.read_some

    def broken(*args: object) -> Iterator[tuple[str, Tensor]]:
        for number, found in enumerate(own(*args)):
            if number == after:
                raise error
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(utils.storage.on_disk, "read_some", broken)
        yield


@pytest.mark.parametrize("streamed", [0, 1])
@pytest.mark.parametrize("after", [0, 13, 19])
@pytest.mark.parametrize("then", [HIGH, LOW])
def test_after_an_interrupted_exchange_either_expert_can_come_and_is_whole(files, monkeypatch, streamed, after, then):
    experts, adapters = held_pair(files, storage("int8", streamed))
    with interrupting(monkeypatch, after), pytest.raises(KeyboardInterrupt):
        experts.activate(LOW)
    assert experts.active is None
    experts.activate(then)
    assert equal(take_turns(experts, adapters), in_turns(files, storage("int8", on_disk=False)))


def test_after_an_interrupted_exchange_previews_bring_their_expert_before_loras_act(files, monkeypatch):
    experts, _ = held_pair(files, storage())
    with interrupting(monkeypatch, 5), pytest.raises(KeyboardInterrupt):
        experts.activate(LOW)
    with torch.no_grad(), experts.beside({}):
        assert experts.predict(draw(), torch.tensor([999.0]), COND).isfinite().all()


def test_an_exchange_of_experts_in_main_memory_that_was_interrupted_is_done_again(files, monkeypatch):
    experts, adapters = held_pair(files, storage(on_disk=False))
    with monkeypatch.context() as patch:
        patch.setattr(experts, "_base", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            experts.activate(LOW)
    assert experts.active is None
    experts.activate(HIGH)
    assert equal(take_turns(experts, adapters), in_turns(files, storage(on_disk=False)))


# --------------------------------------------------------------------------------------------------------- command line

SMALL = (
    "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --learning_rate 1e-2 "
    "--lora_rank 4 --cache_latents 1 --val_samples 0 --checkpointing_steps 2 --cache_dir cache --max_train_steps 3 "
    "--expert_phase_steps 1"
)
LAST = 6  # steps of both experts


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a small model of two experts and clips."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", FAMILIES["wan2.2-t2v-A14B"])
    write_clips(tmp_path / "clips")
    return tmp_path


def train(output: str, *more: str) -> Path:
    """A run's folder of checkpoints."""
    train_wan_lora.main([*SMALL.split(), "--output_dir", output, *more])
    (run,) = Path(output).iterdir()
    return run / "checkpoints"


def final_state(checkpoints: Path) -> dict[str, Tensor]:
    return read_tensors(max(checkpoints.glob("state-*")))[0]


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("flags", ["", "--weight_dtype int8 --blocks_to_swap 1"])
def test_a_run_gives_the_same_states_with_experts_on_disk_and_may_be_resumed_with_or_without(folder, flags, capsys):
    expected = final_state(train("memory", *flags.split()))
    checkpoints = train("disk", *flags.split(), "--idle_expert", "disk")
    printed = capsys.readouterr()
    assert "the expert that waits is on disk: " in printed.out and "--idle_expert" not in printed.out + printed.err
    assert same(final_state(checkpoints), expected)
    for idle in ("disk", "memory"):
        for path in [*checkpoints.glob(f"*-{LAST:08d}*"), *checkpoints.glob(f"*-{LAST - 1:08d}*")]:
            path.unlink()
        resumed = train("disk", *flags.split(), "--resume_from_checkpoint", "latest", "--idle_expert", idle)
        assert same(final_state(resumed), expected)


def test_a_run_whose_model_goes_away_is_saved_and_ends_with_a_message(folder, monkeypatch, capsys):
    take_step = train_wan_lora.take_step

    def lose_the_model(opts, session, run, stream, stop) -> None:
        if run.step == 3:
            for path in (folder / "model").glob("*_noise_model/*.safetensors"):
                path.unlink()
        take_step(opts, session, run, stream, stop)

    monkeypatch.setattr(train_wan_lora, "take_step", lose_the_model)
    argv = ["train_wan_lora.py", *SMALL.split(), "--output_dir", "runs", "--idle_expert", "disk"]
    monkeypatch.setattr("sys.argv", argv)
    assert run_script(train_wan_lora.main, bad_input=(CheckpointError,)) == 1
    message = capsys.readouterr().err
    assert "has changed or is gone, and --idle_expert disk reads it" in message and "Traceback" not in message
    assert list(Path("runs").glob("*/checkpoints/state-00000003.safetensors"))


@pytest.mark.parametrize(
    ("flags", "family"),
    [
        ("--expert high", A14B),
        ("--expert low", A14B),
        ("", FAMILIES["wan2.1-t2v-1.3B"]),
        ("--sample_prompts fox", FAMILIES["wan2.1-t2v-1.3B"]),
    ],
)
@pytest.mark.parametrize("choice", ["disk", "memory"])
def test_where_no_expert_waits_the_option_is_refused(flags, family, choice):
    with pytest.raises(UserError, match=f"--idle_expert {choice} would be ignored"):
        options(f"{flags} --idle_expert {choice}").roles(family)
    options(f"{flags} --idle_expert auto").roles(family)


@pytest.mark.parametrize("flags", ["", "--expert high --sample_prompts fox"])
def test_where_an_expert_waits_it_is_taken(flags):
    assert options(f"{flags} --idle_expert disk").roles(A14B)
