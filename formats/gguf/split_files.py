"""The header of a model in GGUF: in one file, or in the several that large ones are split into.

Parts, as llama.cpp makes them, are named NAME-00001-of-00003.gguf and lie in one folder; the
metadata of the first are the model's.
"""

import re
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from configs.checks import UserError, require
from formats.gguf.header import Header, TensorPlace, read_header

_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def read_model_header(path: Path) -> Header:
    """
    Args:
      path: the file, or any part.
    Raises:
      UserError: see `read_header`; or parts that are missing, or of several models.
    """
    header = read_header(path)
    count = _number(header, path, Keys.Split.LLM_KV_SPLIT_COUNT, default=1)
    if count < 2:
        return header
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered is None or int(numbered[3]) != count:
        raise UserError(
            f"{path} is one of {count} parts of a model, and its name does not say which: give the "
            f"parts the names that they were made with, NAME-00001-of-{count:05d}.gguf"
        )
    paths = [
        path.with_name(f"{numbered[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)
    ]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise UserError(
            f"{path} is one of {count} parts of a model, of which {len(missing)} are not in its "
            f"folder ({', '.join(missing[:3])}): download them, too"
        )
    return _joined(paths)


def _joined(paths: list[Path]) -> Header:
    tensors: dict[str, TensorPlace] = {}
    parts = [read_header(path) for path in paths]
    for i, (path, part) in enumerate(zip(paths, parts, strict=True)):
        place = (
            _number(part, path, Keys.Split.LLM_KV_SPLIT_NO),
            _number(part, path, Keys.Split.LLM_KV_SPLIT_COUNT),
        )
        require(
            place == (i, len(paths)),
            f"{path} says that it is part {place[0] + 1} of {place[1]}, its name says otherwise: "
            "download it again",
        )
        twice = sorted(tensors.keys() & part.tensors.keys())
        require(not twice, f"{path} has {twice[:1]}, which a part before has, too: download them")
        tensors |= part.tensors
    count = _number(parts[0], paths[0], Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, default=len(tensors))
    require(
        count == len(tensors),
        f"{paths[0]} announces {count} tensors in {len(paths)} parts, which have {len(tensors)}: "
        "download them again",
    )
    return Header(parts[0].metadata, tensors)


def _number(header: Header, path: Path, key: str, default: Any = None) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int:
        raise UserError(f"{path} has {key}={value!r}, expected a number: download it again")
    return value
