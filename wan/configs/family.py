"""What a released model is, besides its weights. Each release is one row of `wan.configs.FAMILIES`."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath

from wan.configs.grid import Grid
from wan.modules.model import WanShape

SMALL_AREA = 832 * 480  # pixels


@dataclass(frozen=True)
class Expert:
    """One transformer of a release and the noise levels it is responsible for."""

    name: str
    folder: str  # where its config.json and weights are, relative to the model's folder
    sigmas: tuple[float, float]  # from the lowest to the highest noise level, in 0..1, after the shift
    guidance: float  # of classifier-free guidance at these levels


@dataclass(frozen=True)
class Traits:
    """What tells the family of a checkpoint: widths, and what else its tensors or its config.json say.

    The widths have any type, because they come from JSON. None stands for what is not known.
    """

    dim: object
    in_dim: object
    out_dim: object
    image: bool | None = None  # whether image tokens are read
    positions: bool | None = None  # whether these have learned positions
    task: object = None


@dataclass(frozen=True)
class Family:
    """A released model: how it is laid out on disk, how it is built, and how it is officially sampled."""

    task: str  # "model_type" in config.json
    shape: WanShape  # of the released transformers; a checkpoint with other widths is used in the same way
    experts: tuple[Expert, ...]  # from high noise to low; their intervals cover 0..1
    stride: tuple[int, int, int]  # frames, rows and columns of pixels per latent
    vae: str  # file
    text_encoder: str  # file
    tokenizer: str  # folder
    shift: float
    steps: int
    fps: int
    frames: int
    size: tuple[int, int]  # (width, height) in pixels
    negative_prompt: str  # file in embeddings/
    given: tuple[int, ...] = ()  # the frames of a clip that the model is given: 0 is the first, -1 the last
    given_as: str = ""  # "channels": encoded in extra input channels; "latents": they replace noisy latents
    small_shift: float | None = None  # for videos of 832x480 pixels or fewer, where these have another shift
    clip: str = ""  # file of the vision encoder that the model reads given frames through; none for most
    name: str = ""  # of the row

    @property
    def traits(self) -> Traits:
        """What tells this family."""
        shape = self.shape
        return Traits(shape.dim, shape.in_dim, shape.out_dim, self.clip != "", shape.image_positions > 0, self.task)

    def agrees(self, traits: Traits) -> bool:
        """Whether a checkpoint with these traits can be of this family, whatever its width."""
        facts = asdict(replace(self.traits, dim=traits.dim))
        return all(getattr(traits, name) in (None, fact) for name, fact in facts.items())

    def allows_transformers(self, names: Collection[str]) -> bool:
        """Whether the family has transformers of all these names; it may have more."""
        return set(names) <= {expert.name for expert in self.experts}

    @property
    def in_dim(self) -> int:
        """The input channels of the released transformers."""
        return self.shape.in_dim

    @property
    def out_dim(self) -> int:
        """The channels of the latents."""
        return self.shape.out_dim

    @property
    def guidance(self) -> tuple[float, ...]:
        """The guidance of each expert, from high noise to low."""
        return tuple(expert.guidance for expert in self.experts)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The noise levels at and above which an expert answers, for all but the last; none for a single one."""
        return tuple(expert.sigmas[0] for expert in self.experts[:-1])

    def shift_at(self, width: int, height: int) -> float:
        """The shift that a video of this size is sampled with."""
        is_small = self.small_shift is not None and width * height <= SMALL_AREA
        return self.small_shift if is_small and self.small_shift is not None else self.shift

    @property
    def grid(self) -> Grid:
        """What one token covers: the VAE's stride times the transformer's patch."""
        frame, side = (stride * patch for stride, patch in zip(self.stride[:2], self.shape.patch_size[:2], strict=True))
        return Grid(frame, side)

    @property
    def config_files(self) -> tuple[str, ...]:
        """The config.json of each transformer, relative to the model's folder."""
        return tuple(str(PurePosixPath(expert.folder, "config.json")) for expert in self.experts)

    @property
    def hub_patterns(self) -> tuple[str, ...]:
        """Patterns over the file names of the release's hub repository: everything that training needs."""
        weights = (str(PurePosixPath(expert.folder, "diffusion_pytorch_model*")) for expert in self.experts)
        clip = (self.clip,) if self.clip else ()
        return (*self.config_files, *weights, self.vae, self.text_encoder, f"{self.tokenizer}/*", *clip)
