"""Writes the logits of a list of tokens, for any model that can be read, without converting it.

    python -m scripts.score models/mixtral --tokens-file tokens.json --logits logits.npy

The first is a JSON list of token ids, the second float32 [tokens, vocabulary]: row t predicts token
t + 1. SRC is a run directory, a folder in Hugging Face form, a GGUF file, or smollm2.
"""

from pathlib import Path

import numpy as np

from configs.checks import UserError
from formats.safetensors.header import explain_os_errors
from formats.small_files import read_record
from infer.logits import full_logits
from scripts import command
from scripts.model_options import add_model_options, asked_mesh, chosen_source, load_model


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("--tokens-file", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--logits", type=Path, required=True, help=".npy file to write")
    add_model_options(parser, has_state=False)
    arguments = parser.parse_args(argv)
    mesh = asked_mesh(arguments)
    tokens = read_tokens(arguments.tokens_file)
    source = chosen_source(arguments.source, arguments)
    model, variables = load_model(source, arguments, mesh)
    logits_LV = full_logits(model, variables, tokens, mesh=mesh)
    write_logits(arguments.logits, logits_LV)
    print(f"{arguments.logits}: float32 {list(logits_LV.shape)}")


def write_logits(path: Path, logits_LV: np.ndarray) -> None:
    """The .npy file, whole or not at all.

    Raises:
      UserError: the operating system refuses, as on a full disk.
    """
    partial = path.with_name(path.name + ".partial")
    with explain_os_errors(path, "be written"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                header = np.lib.format.header_data_from_array_1_0(logits_LV)
                np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(logits_LV).data)  # np.save hides the reason
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_tokens(path: Path) -> list[int]:
    """
    Raises:
      UserError: no file, or no JSON list of ids.
    """
    advice = "write the token ids there, as a JSON list"
    try:
        return read_record(list[int], path, advice)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {advice}") from error


if __name__ == "__main__":
    command.execute(main)
