"""The experts that each row's request would rather have.

R rows (sequences), E experts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from configs.architecture import ModelConfig
from infer.engine.checks import preferring_layers


class Preferences:
    """Of all rows, once some request has one; programs of models without run without."""

    def __init__(self, config: ModelConfig, num_rows: int) -> None:
        self._config, self._num_rows = config, num_rows
        self.arrays: dict[str, Any] | None = None
        """float32 [periods, R, E] by layer of the pattern, in numpy that nobody writes to."""

    def begin(self) -> None:
        """Makes room for all rows, where the model has experts at all."""
        config, layers = self._config, preferring_layers(self._config)
        if layers and self.arrays is None:
            self.arrays = {
                name: np.zeros((config.num_periods, self._num_rows, experts), np.float32)
                for name, experts in layers.items()
            }

    def place(self, row: int, wanted: Mapping[str, Any] | None) -> None:
        """A row's preference from now on."""
        if wanted is not None:
            self.begin()
        if self.arrays is None:
            return
        wanted, arrays = wanted or {}, {name: x.copy() for name, x in self.arrays.items()}
        for name, array in arrays.items():
            array[:, row] = np.asarray(wanted[name])[:, 0] if name in wanted else 0.0
        self.arrays = arrays
