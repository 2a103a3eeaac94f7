"""Which source of a mixture a row is from."""

import numpy as np

from configs.data import DataConfig
from data.packing import packed_rows
from data.preferences import PreferencePairs
from data.token_file import TokenFile


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
