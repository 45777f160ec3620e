"""What is written of a run into its folder, its states and its LoRAs."""

from dataclasses import dataclass

from utils.adapters.model_card import ModelCard
from utils.common.decisions import Decisions
from utils.common.options import to_json, training_table
from utils.media.controls import FROM_FILE
from utils.runs.inputs import InputOptions, Inputs
from utils.runs.run import EVERYTHING, RunOptions, RunSettings
from utils.runs.state import Facts
from utils.setup.download import SetupOptions
from utils.training.experts import OWN_RANGE, base_contents


@dataclass(frozen=True)
class DescribedOptions(SetupOptions, InputOptions, RunOptions):
    """what is trained, on what, and how it is called"""


def run_settings(opts: DescribedOptions, inputs: Inputs, total_steps: int, decisions: Decisions) -> RunSettings:
    """What is decided of a run before it begins. Raises UserError for a base model that cannot be read."""
    data, family, base = inputs.data, inputs.files.family, base_contents(inputs.roles, inputs.files, opts.other_files)
    control = FROM_FILE if any(source.control for source in data.train) else opts.control_type * opts.control_lora
    about = {**opts.base(opts.pretrained_model_name_or_path), "control": control, "shift": f"{opts.shift:g}"}
    about |= {"control_i2v": "true"} if opts.control_i2v else {}
    about |= {} if opts.expert_range == OWN_RANGE else {"expert_range": opts.expert_range}
    about |= {key: text for stated in opts.stated(family, inputs.size) for key, text in stated.metadata.items()}
    options, facts = to_json(opts), Facts(training_table(opts), data.fingerprint, decisions.table(), base)
    about |= {"options": options} if opts.metadata == EVERYTHING else {}
    card = ModelCard(family, about["base_model"], inputs.size, data.clips_by_folder, opts.trigger or "")
    return RunSettings(opts.output_dir, total_steps, opts.max_grad_norm, options, facts, about, card, opts.name)
