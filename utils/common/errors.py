"""How a script ends when it cannot do what was asked: with one message, without a traceback."""

from pathlib import Path


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """A run that started well cannot continue. The message says why, and what has been saved. Exit code 1."""


class OutOfMemory(RunError):
    """The GPU's memory is full. `reason` says what did not fit; the message has advice, too.

    `run_folder` is that of a run that has been saved and can go on from there; None for none.
    """

    ADVICE = (
        "fewer tokens need less memory: --token_limit and --base_res when training, --width, --height and --frames "
        "when generating\n--weight_dtype int8 or nf4 and --blocks_to_swap make room that the weights take\n"
        "in training --cache_latents keeps the encoders off the GPU, and --gradient_checkpointing offload what blocks "
        "keep"
    )

    def __init__(self, reason: str, run_folder: Path | None = None) -> None:
        super().__init__(f"{reason}\n{self.ADVICE}")
        self.reason, self.run_folder = reason, run_folder


class LoaderError(RunError):
    """The processes that load clips have died or hang. Everything learned up to then is sound."""
