"""The setting of a run: what is chosen, what a resumed run keeps, and what is next where it was too much."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train_wan_lora
from tests.tiny import TINY_SHAPE, write_clips, write_model
from utils.common.decisions import Decisions
from utils.common.errors import RunError, UserError
from utils.common.options import parse_options
from utils.common.tensor_files import read_tensors
from utils.runs.state import read_state
from utils.training import fit, planning
from utils.training.calibration import Workload
from utils.training.cards import CARDS
from utils.training.choice import WITHOUT_LIBRARY, Given, Limits
from utils.training.fit import LESS, Fit, find_fit
from utils.training.forecast import CONTEXT, Setting, forecast
from utils.training.planning import Budget
from wan.configs import FAMILIES
from wan.modules.model import WanModel

CARD = CARDS["4090"]
WORK = Workload(replace(FAMILIES["wan2.1-t2v-14B"].shape, num_layers=6), 10_000)
OFFLOAD = Setting("bf16", 0, "offload")
LEAST = forecast(WORK, OFFLOAD, CARD).device.total
PLENTY = 1e12
CHOSEN = {"device": "GPU A"}


def budget_of(device: float, host: float = PLENTY) -> Budget:
    return Budget(CARD, Limits(device, host), is_here=True)


def new() -> Decisions:
    return Decisions("GPU A")


def saved(**decided: str) -> Decisions:
    return Decisions("GPU A", {"device": "GPU A"} | decided)


# ------------------------------------------------------------------------------------------------------- what is chosen


def test_where_there_is_room_nothing_is_chosen_but_bf16():
    decisions = new()
    found = find_fit(WORK, budget_of(PLENTY), Given(), decisions)
    assert (found.forecast.setting.weights, found.forecast.setting.streamed) == ("bf16", 0)
    opts = parse_options(train_wan_lora.Options, [])
    assert found.applied(opts, decisions) == opts
    assert decisions.table() == CHOSEN | {"weight_dtype": "bf16", "blocks_to_swap": "0"}


def test_what_is_chosen_is_applied_and_becomes_part_of_the_state():
    decisions = new()
    opts = parse_options(train_wan_lora.Options, ["--layer_offload_fraction", "0.7"])
    found = Fit(WORK, budget_of(PLENTY), Given(streamed=5), forecast(WORK, Setting("int8", 5), CARD))
    applied = found.applied(opts, decisions)
    assert applied == replace(opts, weight_dtype="int8", blocks_to_swap=5, layer_offload_fraction=None)
    assert decisions.table() == CHOSEN | {"weight_dtype": "int8", "blocks_to_swap": "5"}
    assert applied.storage_flags == " --weight_dtype int8 --blocks_to_swap 5"


def test_of_two_experts_the_idle_one_is_on_disk_where_main_memory_is_too_small():
    both, decisions = replace(WORK, experts=2), new()
    found = find_fit(both, budget_of(PLENTY, host=1e9), Given(), decisions)
    opts = found.applied(parse_options(train_wan_lora.Options, []), decisions)
    assert opts.idle_expert == "disk" and decisions.table()["idle_expert"] == "disk"
    assert found.exact_flags == "--idle_expert disk" and " --idle_expert" not in opts.storage_flags
    again = find_fit(both, budget_of(PLENTY), Given(), saved(**decisions.table()))
    assert again.forecast.setting.idle_on_disk  # as before, though there is room now
    assert not find_fit(both, budget_of(PLENTY), Given(idle_on_disk=False), saved()).forecast.setting.idle_on_disk


@pytest.mark.parametrize("gigabytes", [6, 8, 12])
def test_what_is_given_is_never_changed(gigabytes):
    for given in (Given(weights="int8"), Given(streamed=4), Given(checkpointing="full", weights="nf4")):
        setting = find_fit(WORK, budget_of(gigabytes * 1e9), given, new()).forecast.setting
        assert given.weights in (None, setting.weights) and given.streamed in (None, setting.streamed)
        assert given.checkpointing in (None, setting.checkpointing)


def test_where_everything_is_given_it_is_tried_whether_it_fits_or_not(capsys):
    given = Given(weights="bf16", streamed=0)
    found = find_fit(WORK, budget_of(LEAST / 2), given, new())
    assert found.forecast.setting == OFFLOAD
    assert "by forecast this does not fit into" in capsys.readouterr().out
    fits = find_fit(WORK, budget_of(PLENTY), given, new())
    assert set(fits.forecast.setting.checkpointing) == {"none"} and not capsys.readouterr().out


def test_where_nothing_fits_that_is_said():
    with pytest.raises(UserError, match="10,000 tokens do not fit into"):
        find_fit(WORK, budget_of(1e8), Given(), new())


def test_without_its_library_nf4_is_not_chosen(monkeypatch):
    asked: list[Given] = []
    choose = fit.choose
    monkeypatch.setattr(fit, "choose", lambda *args: asked.append(args[3]) or choose(*args))
    monkeypatch.setattr(fit, "find_spec", lambda name: None)
    find_fit(WORK, budget_of(PLENTY), Given(), new())
    find_fit(WORK, replace(budget_of(PLENTY), is_here=False), Given(), new())  # it may be installed there
    assert [given.formats for given in asked] == [WITHOUT_LIBRARY, Given().formats]


# --------------------------------------------------------------------------------------------------------- when resumed


def test_a_resumed_run_keeps_what_was_chosen_and_says_so(capsys):
    found = find_fit(WORK, budget_of(PLENTY), Given(), saved(weight_dtype="int8", blocks_to_swap="4"))
    assert (found.forecast.setting.weights, found.forecast.setting.streamed) == ("int8", 4)
    said = capsys.readouterr().out
    assert "--blocks_to_swap 4, as in the saved run" in said and "--weight_dtype int8, as in the saved run" in said


def test_what_changes_no_numbers_is_chosen_again_where_it_does_not_fit_any_more(capsys):
    decisions = saved(weight_dtype="bf16", blocks_to_swap="0")
    found = find_fit(WORK, budget_of(0.99 * LEAST), Given(), decisions)
    assert found.forecast.setting.weights == "bf16" and found.forecast.setting.streamed > 0
    assert "--blocks_to_swap 0, as in the saved run, does not fit any more by forecast" in capsys.readouterr().out


def test_other_weights_are_refused_on_another_device():
    decisions = Decisions("GPU B", {"device": "GPU A", "weight_dtype": "int8", "blocks_to_swap": "4"})
    with pytest.raises(UserError, match="weight_dtype was int8 on GPU A, and is bf16 on GPU B\npass --allow_changes"):
        find_fit(WORK, budget_of(PLENTY), Given(), decisions)
    assert find_fit(WORK, budget_of(PLENTY), Given(weights="int8"), decisions).forecast.setting.weights == "int8"


@pytest.mark.parametrize(
    "decided", [{"weight_dtype": "int7"}, {"blocks_to_swap": "7"}, {"blocks_to_swap": "-1"}, {"idle_expert": "moon"}]
)
def test_a_state_that_says_nonsense_is_refused(decided):
    sound = {"weight_dtype": "bf16", "blocks_to_swap": "0", "idle_expert": "auto"}
    with pytest.raises(UserError, match=f"the saved run's {next(iter(decided))} is"):
        find_fit(WORK, budget_of(PLENTY), Given(), saved(**sound | decided))


# ---------------------------------------------------------------------------------------------------- what is next


def test_the_next_setting_takes_less_until_there_is_none():
    found, taken = Fit(WORK, budget_of(LEAST), Given(), forecast(WORK, OFFLOAD, CARD)), []
    with pytest.raises(UserError, match="do not fit into"):
        while len(taken) < 100:
            taken.append(found.forecast.device.total)
            found = found.less(keeps_weights=False)
    assert len(taken) > 1 and all(
        after - CONTEXT <= LESS * (before - CONTEXT) for before, after in zip(taken, taken[1:], strict=False)
    )


def test_the_next_setting_has_the_same_numbers_where_steps_were_taken():
    found = Fit(WORK, budget_of(LEAST), Given(), forecast(WORK, OFFLOAD, CARD))
    with pytest.raises(UserError, match="do not fit into"):
        while True:
            found = found.less(keeps_weights=True)
            assert found.forecast.setting.weights == "bf16"
    assert found.forecast.setting.streamed == 6


@pytest.mark.parametrize(
    ("setting", "flags", "exact"),
    [
        (Setting("bf16"), "--weight_dtype bf16", ""),
        (Setting("nf4", 12, ("none", "full")), "--weight_dtype nf4 --blocks_to_swap 12", "--blocks_to_swap 12"),
        (Setting("int8", 0, compile=True), "--weight_dtype int8 --compile on", ""),
    ],
)
def test_the_options_of_a_setting_leave_what_blocks_keep_to_the_run(setting, flags, exact):
    found = Fit(WORK, budget_of(1), Given(), replace(forecast(WORK, OFFLOAD, CARD), setting=setting))
    assert (found.flags, found.exact_flags) == (flags, exact)
    parse_options(train_wan_lora.Options, flags.split())


# ---------------------------------------------------------------------------------------------------- the command line

COMMAND = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 100 --cache_latents 1"
STEPS = "--max_train_steps 4 --checkpointing_steps 2 --learning_rate 1e-2 --val_samples 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_model(folder / "model", base=replace(TINY_SHAPE, num_layers=4))
    write_clips(folder / "clips")
    return folder


@pytest.fixture
def work(folder, tmp_path, monkeypatch) -> Path:
    """The folder; the CPU is planned for as for a GPU, whose memory is full until so many blocks are swapped."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(planning.PlanOptions, "plans_for", lambda self, device: self.vram != "off")
    monkeypatch.setattr(train_wan_lora, "budget", lambda *_, **__: Budget(CARD, Limits(PLENTY, PLENTY), is_here=True))
    monkeypatch.setattr(fit, "LESS", 0.9999)  # the weights are a small part of so small a model
    return tmp_path


LOSS = train_wan_lora.training_loss


def fill(monkeypatch, after: int = 0) -> None:
    """Memory is full while no block is swapped, as soon as so many batches have been trained on."""
    taken: list[int] = []

    def full(*args: Any, model: WanModel, **others: Any) -> torch.Tensor:
        taken.append(1)
        if model.blocks[1].forward.enter is None and len(taken) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")
        return LOSS(*args, model=model, **others)

    monkeypatch.setattr(train_wan_lora, "training_loss", full)


def train(output_dir: Path, flags: str = "") -> None:
    train_wan_lora.main(f"{COMMAND} {STEPS} --output_dir {output_dir} {flags}".split())


def outcome(output_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of the last files of a run."""
    (folder,) = output_dir.glob("*/checkpoints")
    files = {path.name: read_tensors(path)[0] for path in folder.glob("*-00000004.safetensors")}
    return {f"{name}/{key}": tensor for name, each in files.items() for key, tensor in each.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return bool(first) and first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_that_does_not_fit_says_what_would(work, monkeypatch):
    fill(monkeypatch)
    with pytest.raises(RunError) as caught:
        train(work)
    assert re.fullmatch(
        r"CUDA out of memory, while training, before the first step\n"
        r"what fits next, by forecast: --weight_dtype bf16 --blocks_to_swap [34]\n--oom retry takes that by itself",
        str(caught.value),
    )
    assert not list(work.iterdir())


def test_a_run_that_does_not_fit_is_tried_with_less(work, monkeypatch, capsys):
    fill(monkeypatch)
    train(work / "retried", "--oom retry")
    said = capsys.readouterr().out
    (found,) = re.findall(r"trying again with less: --weight_dtype bf16 --blocks_to_swap (\d)", said)
    train(work / "given", f"--weight_dtype bf16 --blocks_to_swap {found}")
    assert same(outcome(work / "retried"), outcome(work / "given"))
    (state,) = (work / "retried").glob("*/checkpoints/state-00000004.safetensors")
    assert read_state(state).facts.decided["blocks_to_swap"] == found


def test_a_run_whose_memory_is_full_later_goes_on_from_there(work, monkeypatch, capsys):
    fill(monkeypatch, after=3 + 3)  # three passes are rehearsed
    train(work / "retried", "--oom retry")
    said = capsys.readouterr().out
    assert "step 3: saved" in said and "trying again with less: --weight_dtype bf16 --blocks_to_swap" in said
    assert len(list((work / "retried").iterdir())) == 1
    fill(monkeypatch, after=1000)
    train(work / "unbroken")
    assert same(outcome(work / "retried"), outcome(work / "unbroken"))


def test_without_a_retry_the_message_says_how_to_resume(work, monkeypatch, capsys):
    fill(monkeypatch, after=3 + 3)
    with pytest.raises(RunError) as caught:
        train(work)
    (folder,) = work.iterdir()
    reason, last, advice, retry = str(caught.value).splitlines()
    assert reason == "CUDA out of memory" and last.startswith("the last checkpoint is ")
    (flags,) = re.findall(rf"--resume_from_checkpoint {folder} --blocks_to_swap [34]$", advice)
    assert advice.startswith("what fits next, by forecast: python ") and retry == "--oom retry does that by itself"
    train(work, flags)
    assert "--weight_dtype bf16, as in the saved run" in capsys.readouterr().out
    assert len(list(work.iterdir())) == 1 and (folder / "checkpoints" / "wan-lora-00000004.safetensors").exists()


def test_with_vram_off_nothing_is_chosen(work, monkeypatch, capsys):
    monkeypatch.setattr(train_wan_lora, "find_fit", None)
    train(work, "--vram off")
    assert "forecast" not in capsys.readouterr().out
    (path,) = work.glob("*/checkpoints/state-00000004.safetensors")
    assert "blocks_to_swap" not in read_state(path).facts.decided


def test_each_try_leaves_more_room_unused():
    found = Fit(WORK, budget_of(LEAST), Given(), forecast(WORK, OFFLOAD, CARD))
    again = found.less(keeps_weights=False)
    assert (found.spare, again.tries) == (0, 1) and again.spare == pytest.approx(1 - LESS)
