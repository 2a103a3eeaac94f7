"""The rows of a mixture in their order, and which source a row is from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.checks import require
from configs.data import DataConfig, MixturePhase
from data.packing import packed_rows
from data.preferences import PreferencePairs
from data.token_file import TokenFile

if TYPE_CHECKING:  # with Orbax it takes 0.2 s, which who trains nothing need not wait for
    import grain

MAX_EPOCHS = 1_000_000  # an endless repeat overflows the length of Grain's prefetch


def rows_of_sources(file: TokenFile, seq_len: int) -> Sequence[Any]:
    """The rows of each source of a mixture, in its order.

    Raises:
      UserError: a source has none.
    """
    empty = [part.name for part in file.sidecar.parts if not part.num_tokens]
    require(
        not empty,
        f"{', '.join(empty)} of data.mixture has no document in {file.path.name}, all are held "
        "out: add documents, or leave the source out",
    )
    return packed_rows(file, seq_len).parts()


def mixed_rows(
    sources: Sequence[Any], seed: int, phases: Sequence[MixturePhase], rows_per_step: int
) -> "grain.MapDataset":
    """The rows of the sources, interleaved by the weights of the phases.

    A source goes on in a phase where the one before has left it.

    Args:
      sources: random access to the rows of each.
      seed: of each source's own order, which is drawn anew when it is through.
    """
    import grain

    shuffled = [
        grain.MapDataset.source(source).seed((seed + i) % 2**63).shuffle().repeat(MAX_EPOCHS)
        for i, source in enumerate(sources)
    ]
    taken, pieces = np.zeros(len(sources), np.int64), []
    for i, phase in enumerate(phases):
        used = [place for place, weight in enumerate(phase.weights) if weight]
        weights = [phase.weights[place] for place in used]
        rests = [shuffled[place][int(taken[place]) :] for place in used]
        piece = grain.MapDataset.mix(rests, weights)
        if i + 1 < len(phases):
            count = (phases[i + 1].first_step - phase.first_step) * rows_per_step
            taken[used] += _counts(weights, count)
            piece = piece[:count]
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else grain.MapDataset.concatenate(pieces)


def _counts(weights: Sequence[float], count: int) -> list[int]:
    """How many of the first `count` rows are from each source: one more than the number of its
    last."""
    import grain

    numbered = [
        grain.MapDataset.range(MAX_EPOCHS * MAX_EPOCHS).map(lambda number, place=i: (place, number))
        for i in range(len(weights))
    ]
    mixed, found = grain.MapDataset.mix(numbered, weights), {}
    for index in range(count - 1, -1, -1):
        if len(found) == len(weights):
            break
        place, number = mixed[index]  # type: ignore[misc]
        found.setdefault(place, number + 1)
    return [found.get(i, 0) for i in range(len(weights))]


class MixtureRows:
    """The sources of a token file's rows, by number; without any where the data is no mixture."""

    def __init__(self, data: DataConfig, file: TokenFile) -> None:
        self.names: tuple[str, ...] = ()
        if not data.mixture:
            return
        self.names = tuple(part.source for part in data.mixture)
        rows = packed_rows(file, data.seq_len)
        held = [i for i, part in enumerate(file.sidecar.parts) if part.num_tokens]
        unit = 2 if isinstance(rows, PreferencePairs) else 1
        if file.sidecar.has_loss_mask:
            firsts = [unit * part.first for part in rows.parts()]
        else:  # rows that two sources share are the first one's
            firsts = [-(-file.sidecar.parts[i].first_token // data.seq_len) for i in held]
        self._firsts, self._held = np.array(firsts), np.array(held)

    def __bool__(self) -> bool:
        return bool(self.names)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The source of each row, int32; -1 of a row below 0, which is none."""
        places = np.searchsorted(self._firsts, rows, side="right") - 1
        return np.where(rows < 0, -1, self._held[np.maximum(places, 0)]).astype(np.int32)
