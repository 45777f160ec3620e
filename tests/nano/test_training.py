import pytest
import torch
from torch import nn

from nano.pretrain_vae import fold_statistics, initialise
from nano.training import Muon, Stage, autocast, fit, is_matrix, orthogonalised, training_dtype
from tests.tiny import tiny_vae
from utils.common.errors import UserError
from utils.encoding.conditioning import to_unit_range
from wan.modules.vae import WanVAE


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32), ("DEFAULT", torch.float32)]
)
def test_a_cpu_that_is_slow_in_bf16_trains_in_fp32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    device = torch.device("cpu")
    with autocast(device):
        assert training_dtype(device) == (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert training_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_an_orthogonalised_matrix_has_singular_values_near_one_and_the_same_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalised(matrices)
    values = torch.linalg.svdvals(result.float())
    assert result.shape == matrices.shape and values.min() > 0.1 and values.max() < 1.4
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ v
    assert torch.cosine_similarity(result.flatten(1), nearest.flatten(1)).min() > 0.9


def test_muon_updates_a_kernel_like_the_matrix_with_a_row_per_output_channel():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(20, 6, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    for parameter in (kernel, matrix):
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter)
        Muon([parameter], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_muon_calls_a_closure_and_returns_its_loss():
    parameter = nn.Parameter(torch.eye(4))

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert Muon([parameter], lr=0.1).step(closure) == 4.0
    assert not torch.equal(parameter, torch.eye(4))


def test_adamw_trains_narrow_matrices_embeddings_and_the_last_layer():
    wide, narrow = nn.Parameter(torch.zeros(32, 32)), nn.Parameter(torch.zeros(32, 8))
    assert is_matrix("blocks.0.ffn.0.weight", wide)
    for name, parameter in (("blocks.0.x", narrow), ("text_embedding.0.weight", wide), ("head.head.weight", wide)):
        assert not is_matrix(name, parameter)


@pytest.fixture
def problem():
    """A function that trains a small regression, whose data depends only on the step, in a folder."""
    target = torch.randn(24, 24, generator=torch.Generator().manual_seed(1)) / 5

    def train(work, stop_at: int | None = None) -> dict:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))

        def loss_at(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(64, 24)
            return (model(x) - x @ target).square().mean()

        stage = Stage("small", 0, 300, 2e-2, 1e-2, ema_decay=0.9, evaluate_every=300, data="squares")
        return fit(model, stage, loss_at, lambda average, step: "", work).state_dict()

    return train


def test_an_interrupted_training_resumes_to_the_same_weights(tmp_path, problem):
    (tmp_path / "straight").mkdir()
    (tmp_path / "broken").mkdir()
    straight = problem(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        problem(tmp_path / "broken", stop_at=250)
    assert torch.load(tmp_path / "broken" / "small.pt", weights_only=True)["step"] == 200
    resumed = problem(tmp_path / "broken")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("content", [b"", b"no state", "another stage", "another model"])
def test_a_state_that_is_damaged_or_belongs_to_another_training_is_refused(tmp_path, problem, content):
    problem(tmp_path)
    path = tmp_path / "small.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        state = torch.load(path, weights_only=True)
        state = {"step": 1} if content == "another stage" else state | {"model": {"weight": torch.zeros(2)}}
        torch.save(state, path)
    with pytest.raises(UserError, match="small.pt is damaged, or belongs to another training"):
        problem(tmp_path)


def test_training_lowers_the_loss(tmp_path, problem):
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    model.load_state_dict(problem(tmp_path))
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(5))
    target = torch.randn(24, 24, generator=torch.Generator().manual_seed(1)) / 5
    error = (model(x) - x @ target).square().mean() / (x @ target).square().mean()
    assert error < 0.2


def test_folding_the_statistics_changes_the_latents_but_not_the_reconstruction():
    vae = tiny_vae()
    clips = torch.rand(6, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = vae.decode(vae.encode(clips))
    mean, log_variance = vae.posterior(clips)
    scale = vae.latent_std.flatten() / mean.std(dim=(0, 2, 3, 4))
    folded = fold_statistics(vae, clips)
    latents = folded.encode(clips)
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-4
    assert (latents.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-4
    assert (folded.decode(latents) - before).abs().max() < 1e-4
    changed = (folded.posterior(clips)[1] - log_variance).mean(dim=(0, 2, 3, 4))
    assert (changed - 2 * scale.log()).abs().max() < 1e-4


def test_a_new_vae_treats_every_frame_like_an_image():
    torch.manual_seed(0)
    vae = initialise(WanVAE(16)).eval()
    frame = to_unit_range(torch.randint(0, 256, (1, 3, 1, 32, 32)).to(torch.uint8))
    with torch.no_grad():
        mean, log_variance = vae.posterior(frame.expand(-1, -1, 9, -1, -1))
        assert (mean[:, :, 1] - mean[:, :, 2]).abs().max() < 1e-5
        assert log_variance.mean() < -5
        video = vae.generate(mean[:, :, 1:2].expand(-1, -1, 3, -1, -1))
        assert (video[:, :, 1:5] - video[:, :, 5:]).abs().max() < 1e-4
