"""Bits per byte of any folder or file of yours: `bpb:FOLDER`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from configs.checks import require
from data.corpora import read_documents
from evals.samples import Family, Load, Task, Text
from evals.scoring import ROLLING


def folder_task(folder: str) -> Task:
    """The task of a folder's files, each a text of its own; 'stdlib' is this Python's library.

    Raises:
      UserError: there is no such folder.
    """
    require(
        folder == "stdlib" or Path(folder).exists(),
        f"bpb:{folder} names no folder and no file: give bpb:FOLDER or bpb:stdlib",
    )
    return Task(
        name=f"bpb:{folder}",
        version=1,
        description=f"Bits per byte of the files in {folder}.",
        origin=folder,
        license="as the text's",
        output_type="loglikelihood_rolling",
        metrics=ROLLING,
        load=partial(_load, folder),
        metadata={"unit": "bits per byte"},
    )


def _load(folder: str, settings: Load) -> Sequence[Text]:
    suffix = ".py" if folder == "stdlib" else ""
    documents = read_documents(folder, suffix)
    return [Text(document.name, document.text) for document in documents][: settings.limit]


TASKS = (
    Family(
        form="bpb:FOLDER",
        description="Bits per byte of every text file in a folder (or of one file) of yours.",
        make=folder_task,
    ),
)
