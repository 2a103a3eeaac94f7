"""A model by itself in our own form: model.json, its variables, its tokenizer's files.

What a conversion writes and what training may begin with; a run directory (run_directory.py) holds
an experiment instead. The variables lie as in a run's checkpoint, so both are restored by one
function, at any device count; rounded ones in their codes (rounded_folder.py).
"""

from pathlib import Path
from typing import Any

from checkpoint.orbax_store import STATE, restore_variables
from checkpoint.rounded_folder import (
    has_rounded,
    is_rounded_folder,
    read_rounded,
    write_rounded,
)
from configs.architecture import ModelConfig
from configs.checks import UserError
from configs.serialization import to_json
from formats.small_files import read_record

CONFIG = "model.json"
VARIABLES = "checkpoints/0"


def is_model_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_model_config(folder: Path) -> ModelConfig:
    """
    Raises:
      UserError: the file is damaged.
    """
    return read_record(ModelConfig, folder / CONFIG, "convert the model again")


def write_model_folder(folder: Path, config: ModelConfig, variables: Any) -> None:
    """Writes model.json and the variables into a folder that has neither.

    Raises:
      UserError: the disk is full, or may not be written.
    """
    from orbax.checkpoint import v1 as ocp  # as in checkpoint/orbax_store.py

    target = folder.absolute() / VARIABLES
    try:
        if has_rounded(variables):
            write_rounded(folder, variables)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            state = {name: part for name, part in variables.items() if part}
            ocp.save_checkpointables(str(target), {STATE: state}, overwrite=True)
        (folder / CONFIG).write_text(to_json(config))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} can't be written: {error}") from error


def restore_model_folder(folder: Path, abstract_variables: Any) -> Any:
    """The variables, laid out and typed as the abstract ones.

    Raises:
      UserError: they are damaged, or of another model.
    """
    if is_rounded_folder(folder):
        return read_rounded(folder, abstract_variables)
    variables, _ = restore_variables((folder / VARIABLES).parent, abstract_variables)
    return variables
