"""What is advised for a LoRA that a run cannot start from works when it is done."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_wan_lora
from tests.adapted import ALPHA, RANK, adapted, fill
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.attach import plan_adapter
from utils.adapters.initial import differences, load_lora, options_for, targets_of
from utils.adapters.lora import add_lora, extract_lora, select_modules, widen_patch_embedding
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError
from utils.common.options import parse_options
from wan.modules.model import WanModel

IMAGE_SHAPE = replace(TINY_SHAPE, num_layers=4, in_dim=36, image_dim=20)
DEEP_SHAPE = replace(TINY_SHAPE, num_layers=4)
TWO = ("high_noise", "low_noise")
Q = "blocks.0.self_attn.q"


def layout(shape=DEEP_SHAPE) -> WanModel:
    with torch.device("meta"):
        return WanModel(shape)


def trained(targets=("attn",), blocks=None, rank=RANK, alpha=ALPHA, shape=DEEP_SHAPE, control=False) -> LoraFile:
    model = tiny_transformer(shape)
    modules = select_modules(model, targets, blocks)
    if control:
        widen_patch_embedding(model, shape.in_dim + shape.out_dim)
        modules.append("patch_embedding")
    fill(add_lora(model, modules, rank, alpha))
    return extract_lora(model, {})


def plan(flags: str, shape=DEEP_SHAPE, expert="high_noise", experts=("high_noise",)):
    """The plan of one transformer for a command line."""
    opts = parse_options(train_wan_lora.Options, shlex.split(flags))
    side = expert.removesuffix("_noise")
    own = {name: getattr(opts, f"{side}_{name}") for name in ("lora_rank", "lora_alpha")}
    opts = replace(opts, **{name: value for name, value in own.items() if value is not None})
    return plan_adapter(opts, layout(shape), expert, experts)


def advised(flags: str, message: str) -> str:
    """The command line after the last line of a message was followed."""
    _, _, advice = message.rpartition("\nPass ")
    assert advice, message
    added, _, left_out = advice.partition(", and leave out --lora_blocks" if "leave out" in advice else " instead of ")
    words = shlex.split(flags)
    removed = ["--init_lora"] if " instead of " in advice else []
    removed += ["--fuse_lora"] if "and of --fuse_lora" in advice else []
    removed += ["--lora_blocks"] if "leave out" in advice else []
    for name in removed:
        index = words.index(name)
        del words[index : index + 2]
    return f"{shlex.join(words)} {added}"


CASES = {
    "all": ({"targets": ("all-linear",)}, "", "--lora_target all-linear"),
    "ffn": ({"targets": ("attn", "ffn.*")}, "--lora_blocks 0", "--lora_target all-linear"),
    "one": ({"targets": ("self_attn.q", "ffn.0")}, "", "--lora_target self_attn.q ffn.0"),
    "blocks": ({"blocks": "0,2-3"}, "", "--lora_target attn --lora_blocks 0,2-3"),
    "named": ({"targets": ("blocks.0.ffn.0", "blocks.2.ffn.2")}, "", "--lora_target blocks.0.ffn.0 blocks.2.ffn.2"),
    "rank": ({"rank": 8, "alpha": 0.1}, "--lora_alpha 3", "--lora_rank 8 --lora_alpha 0.1"),
    "third": ({"alpha": 1 / 3}, "", "--lora_rank 4 --lora_alpha 0.333333"),
    "both": (
        {"targets": ("ffn.*",), "rank": 2},
        "--lora_blocks 1",
        '--lora_target "ffn.*", and leave out --lora_blocks',
    ),
    "control": ({"control": True}, "", "--lora_target attn --control_lora"),
}


@pytest.mark.parametrize("name", CASES)
def test_options_that_are_advised_are_accepted(tmp_path, monkeypatch, name):
    kind, more, expected = CASES[name]
    monkeypatch.chdir(tmp_path)
    write_lora(Path("fox.safetensors"), trained(**kind))
    flags = f"--dataset clips --init_lora fox.safetensors {more}"
    with pytest.raises(UserError, match=r"--init_lora fox\.safetensors: it ") as caught:
        plan(flags)
    assert expected in str(caught.value)
    found = plan(advised(flags, str(caught.value)))
    assert found.init is not None and found.fusion is None


def test_a_model_with_an_image_embedding_tells_its_layers_from_those_without(tmp_path, monkeypatch):
    """Other trainers leave the image embedding out, and `all-linear` here does not."""
    monkeypatch.chdir(tmp_path)
    for targets, expected in ((("attn", "ffn.*"), '--lora_target attn "ffn.*"'), (("all-linear",), "all-linear")):
        write_lora(Path("fox.safetensors"), trained(targets, shape=IMAGE_SHAPE))
        flags = "--dataset clips --init_lora fox.safetensors --lora_rank 4 --lora_alpha 6 --lora_target self_attn.q"
        with pytest.raises(UserError, match="it adapts") as caught:
            plan(flags, IMAGE_SHAPE)
        assert expected in str(caught.value)
        assert plan(advised(flags, str(caught.value)), IMAGE_SHAPE).init is not None


def varying(kind: str) -> LoraFile:
    """A LoRA that no options make."""
    lora = trained(control=kind == "control", targets=("self_attn.q",))
    other = lora.pairs[Q]
    changed = {
        "rank": LoraPair(other.down[:2], other.up[:, :2], ALPHA),
        "control": LoraPair(other.down[:2], other.up[:, :2], ALPHA),
        "alpha": replace(other, alpha=2.0),
        "zero": replace(other, alpha=0.0),
    }
    lora.pairs.update({Q: changed[kind]} if kind in changed else {})
    if kind == "zero":
        lora.pairs.update({name: replace(pair, alpha=0.0) for name, pair in lora.pairs.items()})
    if kind == "head":
        lora.pairs["head.head"] = LoraPair(torch.ones(4, 48), torch.ones(64, 4), ALPHA)
    return replace(lora, diffs={"blocks.0.norm3.diff": torch.ones(48)}) if kind == "diff" else lora


@pytest.mark.parametrize("kind", ["rank", "alpha", "zero", "diff", "head", "control"])
def test_a_lora_that_no_options_make_is_to_be_fused_and_can_be(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write_lora(Path("fox.safetensors"), varying(kind))
    write_lora(Path("speed.safetensors"), trained())
    same = "--lora_rank 4 --lora_alpha 6 --lora_target self_attn.q"
    for fused in ("", "--fuse_lora speed.safetensors"):
        flags = f"--dataset clips --init_lora fox.safetensors {same} {fused}"
        with pytest.raises(UserError, match=r"Pass --fuse_lora fox\.safetensors") as caught:
            plan(flags)
        followed = advised(flags, str(caught.value))
        assert "--init_lora" not in followed and ("--control_lora" in followed) == (kind == "control")
        found = plan(followed)
        assert found.init is None and found.fusion is not None and f"{Q}.weight" in found.fusion.targets


def test_a_control_is_not_begun_in_a_lora_without_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lora(Path("fox.safetensors"), trained(rank=16, alpha=16.0))
    flags = "--dataset clips --init_lora fox.safetensors --control_lora --control_inject_noise 0.1"
    with pytest.raises(
        UserError, match=r"it lacks patch_embedding.*\nPass --fuse_lora fox\.safetensors inst"
    ) as caught:
        plan(flags)
    assert plan(advised(flags, str(caught.value))).fusion is not None


def test_nothing_is_advised_for_a_lora_of_another_wan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lora(Path("fox.safetensors"), LoraFile({Q: LoraPair(torch.ones(2, 7), torch.ones(7, 2), 2.0)}))
    with pytest.raises(UserError, match=r"^fox\.safetensors: the LoRA has \(7, 7\).*, .* is it for another Wan\?$"):
        plan("--dataset clips --init_lora fox.safetensors")
    for name in ("high", "low"):
        Path(f"style_{name}_noise.safetensors").write_bytes(Path("fox.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"^style_low_noise\.safetensors: the LoRA has "):
        plan("--dataset clips --init_lora style.safetensors", expert="low_noise", experts=TWO)


def test_advice_can_be_pasted_where_a_name_has_a_space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lora(Path("my fox.safetensors"), varying("rank"))
    with pytest.raises(UserError, match="Pass --fuse_lora 'my fox.safetensors' instead of --init_lora"):
        plan("--dataset clips --init_lora 'my fox.safetensors'")


def test_a_pair_is_advised_what_works_for_both_experts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--dataset clips --init_lora fox.safetensors"
    write_lora(Path("fox_high_noise.safetensors"), trained(("ffn.*",), rank=2, alpha=2.0))
    write_lora(Path("fox_low_noise.safetensors"), trained(("ffn.*",), rank=8, alpha=8.0))
    for expert in TWO:  # each message leads to the next, and none back
        with pytest.raises(UserError, match="Pass ") as caught:
            plan(flags, expert=expert, experts=TWO)
        flags = advised(flags, str(caught.value))
    assert "--high_lora_rank 2" in flags and "--low_lora_rank 8" in flags and "ffn" in flags
    assert all(plan(flags, expert=expert, experts=TWO).init is not None for expert in TWO)

    # The targets of one would be refused for the other.
    write_lora(Path("fox_low_noise.safetensors"), trained(("attn",)))
    flags = "--dataset clips --init_lora fox.safetensors"
    with pytest.raises(UserError, match=r"Pass --fuse_lora fox\.safetensors") as caught:
        plan(flags, experts=TWO)
    assert all(plan(advised(flags, str(caught.value)), expert=e, experts=TWO).fusion for e in TWO)


def test_a_lora_that_fits_differs_in_nothing_also_with_an_alpha_as_a_file_holds_it():
    lora, model = trained(alpha=0.1), layout()
    modules = select_modules(model, ["attn"])
    assert differences(lora, modules, RANK, float(torch.tensor(0.1))) == []
    assert differences(lora, modules, RANK, 0.2) == ["it has rank 4 and alpha 0.1, this run 4 and 0.2"]
    assert options_for(lora, model, modules, RANK, 0.2) == {"lora_rank": 4, "lora_alpha": 0.1}


def test_no_options_make_an_adapter_with_more_than_pairs_or_without_the_control_of_this_run():
    lora, model = trained(), layout()
    modules = select_modules(model, ["attn"])
    more = replace(lora, diffs={"blocks.0.norm3.diff": torch.ones(48)})
    assert options_for(more, model, modules, RANK, ALPHA) is None
    assert options_for(lora, model, [*modules, "patch_embedding"], RANK, ALPHA) is None


def test_targets_are_found_for_any_choice_of_layers_that_is_short_enough_to_type():
    model = layout(IMAGE_SHAPE)
    for targets, blocks in (
        (("attn",), None),
        (("all-linear",), None),
        (("img_emb.*",), None),
        (("cross_attn.k_img", "img_emb.proj.1"), None),
        (("self_attn.*",), "1-2"),
        (("blocks.1.ffn.0", "img_emb.proj.3"), None),
    ):
        modules = select_modules(model, targets, blocks)
        found = targets_of(model, modules)
        assert found is not None and set(select_modules(model, *found)) == set(modules)
    every = select_modules(model, ("all-linear",))
    irregular = [name for index, name in enumerate(every) if index % 7 < 3]
    assert targets_of(model, irregular) is None and targets_of(model, ["head.head"]) is None


# ------------------------------------------------------------------------------------------------------------- loading


def changed(lora: LoraFile, name: str, pair: LoraPair | None) -> LoraFile:
    """The same LoRA with one pair replaced, or taken out."""
    pairs = lora.pairs | {name: pair}
    return LoraFile({name: pair for name, pair in pairs.items() if pair is not None})


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            LoraPair(torch.ones(2, 48), torch.ones(48, 2), ALPHA),
            "it has rank 2 to 4 and alpha 6, this run 4 and 6",
        ),
        (
            LoraPair(torch.ones(4, 48), torch.ones(48, 4), 8.0),
            "it has rank 4 and alpha 6 to 8, this run 4 and 6",
        ),
        (
            LoraPair(torch.ones(4, 48), torch.ones(48, 4), None),
            "it has rank 4 and alpha 4 to 6, this run 4 and 6",
        ),
        (LoraPair(torch.ones(4, 32), torch.ones(48, 4), ALPHA), r"does not fit at blocks\.0\.self_attn\.q"),
        (LoraPair(torch.ones(4, 48), torch.ones(32, 4), ALPHA), r"\(32, 4\), the model needs \(48, 4\)"),
        (None, r"it lacks blocks\.0\.self_attn\.q, a module that this run adapts"),
    ],
)
def test_a_lora_that_cannot_be_started_from_is_refused(pair, message):
    model, _ = adapted()
    with pytest.raises(UserError, match=message):
        load_lora(model, changed(extract_lora(model, {}), Q, pair))


def test_a_lora_with_other_targets_or_more_than_pairs_is_refused():
    model, _ = adapted(("attn",))
    more = extract_lora(adapted()[0], {})
    with pytest.raises(UserError, match=r"it adapts 4 modules, such as blocks\.0\.ffn\.0, that this run does not"):
        load_lora(model, more)
    extra = LoraFile(extract_lora(model, {}).pairs, diffs={"blocks.0.norm3.diff": torch.ones(48)})
    with pytest.raises(UserError, match=r"holds more than LoRA pairs \(blocks\.0\.norm3\.diff\)"):
        load_lora(model, extra)
