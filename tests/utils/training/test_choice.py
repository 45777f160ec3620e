"""What is chosen fits, is the fastest, and leaves alone what is given."""

from dataclasses import replace
from itertools import product

import pytest

from utils.common.errors import UserError
from utils.training import choice
from utils.training.calibration import Workload
from utils.training.cards import CARDS
from utils.training.choice import AS_FAST, WEIGHTS, Given, Limits, choose
from utils.training.forecast import Setting, forecast
from wan.configs import FAMILIES

CARD = CARDS["4090"]
# Few blocks, so that all settings can be tried; as wide as the largest model.
WORK = Workload(replace(FAMILIES["wan2.1-t2v-14B"].shape, num_layers=6), 10_000)
LONG = replace(WORK, tokens=32_760)
PLENTY = 1e12
UP = ("offload", "full", "selective", "none")


def every_setting() -> list[Setting]:
    mixtures = {(upper,) * n + (lower,) * (6 - n) for lower, upper in zip(UP, UP[1:], strict=False) for n in range(7)}
    return [Setting(*parts) for parts in product(WEIGHTS, (0, 3, 4, 5, 6), mixtures)]


@pytest.mark.parametrize("gigabytes", [5.5, 7, 9, 12, 16, 24])
def test_nothing_that_fits_is_faster(gigabytes):
    limits = Limits(gigabytes * 1e9, PLENTY)
    found = choose(WORK, CARD, limits)
    assert limits.hold(found)
    fitting = [each for each in (forecast(WORK, setting, CARD) for setting in every_setting()) if limits.hold(each)]
    assert found.seconds.total <= AS_FAST * min(each.seconds.total for each in fitting)


def test_with_plenty_of_memory_nothing_is_saved():
    assert choose(WORK, CARD, Limits(PLENTY, 0)).setting == Setting("bf16", 0, ("none",) * 6)


def test_more_memory_is_never_slower_beyond_what_counts_as_equal():
    times = [choose(WORK, CARD, Limits(n * 1e9, PLENTY)).seconds.total for n in (5.5, 7, 9, 12, 16, 24)]
    assert all(after <= AS_FAST * before for before, after in zip(times, times[1:], strict=False))


def test_bf16_is_preferred_and_then_what_streams_less():
    limit = forecast(LONG, Setting("bf16", 4), CARD).device.total
    assert choose(LONG, CARD, Limits(limit, PLENTY), Given(checkpointing="full")).setting == Setting("bf16", 4)


def test_what_is_faster_by_less_than_the_forecast_knows_is_no_reason_to_stream(monkeypatch):
    resident = Setting("bf16", 0, ("none",) * 4 + ("selective",) * 2)
    limits = Limits(forecast(LONG, resident, CARD).device.total, PLENTY)
    monkeypatch.setattr(choice, "AS_FAST", 1.0)
    assert choose(LONG, CARD, limits).setting.streamed > 0
    monkeypatch.setattr(choice, "AS_FAST", 1.1)
    assert choose(LONG, CARD, limits).setting == resident


def test_all_blocks_under_one_strategy_may_fit_where_a_mixture_does_not():
    """A block that runs again needs more working memory than it saves, where it is the only one."""
    settings = (Setting(checkpointing=("none",) * n + ("selective",) * (6 - n)) for n in (6, 5))
    everything, almost = (forecast(LONG, setting, CARD) for setting in settings)
    assert everything.device.total < almost.device.total
    assert choose(LONG, CARD, Limits(everything.device.total, 0)).setting == everything.setting


def test_where_main_memory_is_small_weights_are_quantised_in_their_order():
    given = Given(checkpointing="full")
    sizes = [forecast(LONG, Setting(weights), CARD).device.total for weights in WEIGHTS]
    chosen = [choose(LONG, CARD, Limits(size, 0), given).setting for size in sizes]
    assert [setting.weights for setting in chosen] == list(WEIGHTS)
    assert {setting.streamed for setting in chosen} == {0}


@pytest.mark.parametrize(
    "given",
    [
        Given(weights="nf4"),
        Given(weights="fp8"),
        Given(weights="fp32", checkpointing="full"),
        Given(streamed=0),
        Given(streamed=2),
        Given(checkpointing="full"),
        Given(checkpointing=("none",) * 3 + ("full",) * 3),
        Given(compile=True),
        Given("bf16", 6, "offload", True),
    ],
)
@pytest.mark.parametrize("gigabytes", [14, 30])
def test_what_is_given_stays(given, gigabytes):
    setting = choose(WORK, CARD, Limits(gigabytes * 1e9, PLENTY), given).setting
    for part in ("weights", "streamed", "checkpointing", "compile"):
        value = getattr(given, part)
        assert value is None or getattr(setting, part) == value


def test_inputs_wait_in_main_memory_only_where_there_is_room():
    given = Given(weights="bf16", streamed=0)
    limit = forecast(WORK, Setting(checkpointing="full"), CARD).device.total - 1
    found = choose(WORK, CARD, Limits(limit, PLENTY), given)
    assert "offload" in found.setting.checkpointing
    assert choose(WORK, CARD, Limits(limit, found.host.total), given) == found
    with pytest.raises(UserError, match="of main memory"):
        choose(WORK, CARD, Limits(limit, found.host.total - 1), given)


def test_a_card_that_is_too_small_gives_the_sentence_that_says_what_would_fit():
    least = forecast(WORK, Setting("nf4", 6, "offload"), CARD)
    limits = Limits(least.device.total * 0.8, PLENTY)
    with pytest.raises(UserError, match="10,000 tokens do not fit into") as error:
        choose(WORK, CARD, limits)
    text = str(error.value)
    assert f"the least takes {least.device.total / 1e9:.2f} GB of GPU memory" in text
    assert "nf4 weights, 6 of 6 blocks swapped, checkpointing offload" in text
    tokens = int(text.split("--token_limit ")[1].split(" would fit")[0])
    fits = [limits.hold(forecast(replace(WORK, tokens=n), least.setting, CARD)) for n in (tokens, tokens + 100)]
    assert fits == [True, False]
    with pytest.raises(UserError, match="nor do fewer tokens fit"):
        choose(WORK, CARD, Limits(1e9, PLENTY))


def test_plain_fp8_is_never_chosen_by_itself():
    assert "fp8" not in choice.WEIGHTS


@pytest.mark.parametrize("given", [Given("bf16", 0), Given("bf16", 6)])
def test_the_idle_expert_is_on_disk_only_where_main_memory_is_too_small_for_it(given):
    both, setting = replace(WORK, experts=2), Setting("bf16", given.streamed, "full")
    in_memory, on_disk = (
        forecast(both, replace(setting, idle_on_disk=place), CARD).host.total for place in (False, True)
    )
    for host, expected in ((PLENTY, False), (in_memory, False), (in_memory - 1, True), (on_disk, True)):
        found = choose(both, CARD, Limits(PLENTY, host), given)
        assert found.setting.idle_on_disk == expected and found.host.total <= host
    assert choose(both, CARD, Limits(PLENTY, PLENTY), replace(given, idle_on_disk=True)).setting.idle_on_disk
    assert not choose(WORK, CARD, Limits(PLENTY, PLENTY), given).setting.idle_on_disk


def test_encoders_that_compute_while_blocks_keep_nothing_need_room_beside_the_weights():
    given = Given("bf16", checkpointing="offload")
    limit = forecast(WORK, Setting("bf16", 0, "offload"), CARD).device.total
    plain = choose(WORK, CARD, Limits(limit, PLENTY), given)
    encoding = limit - plain.device.resident + 1
    limits = Limits(limit, PLENTY, encoding)
    found = choose(WORK, CARD, limits, given)
    assert plain.setting.streamed == 0 and limits.hold(found) and not limits.hold(plain)
    assert limits.needed(found) == max(found.device.total, found.device.resident + encoding)
    with pytest.raises(UserError, match=f"of that the VAE takes {limit / 1e9:.2f} GB while it computes: --cache_lat"):
        choose(WORK, CARD, Limits(limit, PLENTY, limit))
