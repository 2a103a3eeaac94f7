"""A checkpoint in a public form, opened: its family, its model, and the way to its variables."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import assemble, match
from checkpoint.config_reader import Settings
from checkpoint.families import FAMILIES
from checkpoint.families.base import Family
from checkpoint.weight_map import Entry, Row, expand, flatten
from configs.architecture import ModelConfig, MultiTokenConfig
from configs.checks import UserError
from configs.feed_forward import FeedForward, MoEConfig, RouterConfig
from configs.serialization import differences
from configs.shared_keys import shares_keys, with_own_keys


@dataclass(frozen=True)
class PublicCheckpoint:
    """What reading the headers told; no tensor has been read."""

    path: Path
    family: Family
    settings: Settings
    """Its config.json, or what stands for one."""
    config: ModelConfig
    rows: Sequence[Row]
    tensors: assemble.Tensors
    is_in_four_bits: bool = False
    """Whether the layers' weights lie in blocks of four bits."""

    def left_out(self) -> list[str]:
        """Sentences about the tensors of other parts than the text model."""
        sentences = []
        for rule, part in self.family.unread:
            count = sum(re.fullmatch(rule, name) is not None for name in self.tensors.shapes)
            if count:
                sentences.append(
                    f"{self.path} holds {part} in {count} tensors, which are left out: the text "
                    "model is read"
                )
        return sentences

    def load(
        self,
        abstract_variables: Any,
        progress: assemble.Progress = lambda _: None,
        convert: assemble.Convert = lambda _, x: x,
    ) -> Any:
        """The variables of `config`'s model, each tensor read once for each shard it lies in.

        Args:
          abstract_variables: of that model: ShapeDtypeStructs with shardings.
          convert: see assemble.load.
        Raises:
          UserError: a tensor is missing, unknown, of another shape, truncated or not finite.
        """
        entries = self._checked_entries(abstract_variables)
        return assemble.load(entries, self.tensors, abstract_variables, progress, convert)

    def unread(self, abstract_variables: Any) -> Any:
        """As `load`, with an `assemble.LazyParameter` for each array: what is damaged is told
        later, when it is read.
        """
        entries = self._checked_entries(abstract_variables)
        return assemble.unread(entries, self.tensors, abstract_variables)

    def _checked_entries(self, abstract_variables: Any) -> list[Entry]:
        entries = expand(self.rows, self.config, flatten(abstract_variables))
        copies = match.expanded_copies(
            self.family.copies, self.tensors.shapes, is_tied=self.config.tie_embeddings
        )
        unread = [rule for rule, _ in self.family.unread]
        ignored = (*self.family.ignored, *self.family.unused(self.config), *unread)
        match.check_names(entries, self.tensors, copies, ignored, self.path)
        match.check_copies(copies, self.tensors)
        match.check_tables(entries, self.tensors, self.config)
        return entries


def find_family(settings: Settings) -> Family:
    """The family that a config.json names.

    Raises:
      UserError: none of ours.
    """
    known = {family.model_type: family for family in FAMILIES}
    classes = {family.architecture: family for family in reversed(FAMILIES)}  # the first counts
    name = settings.text("model_type", default=None)
    architecture = (settings.items("architectures", of=str, default=[]) or [None])[0]
    family = classes.get(str(architecture)) if name is None else known.get(name)
    if family is None:
        raise UserError(
            f"{settings.where} has model_type={name!r}, architectures={architecture!r}; the "
            f"families that can be read are {', '.join(known)}"
        )
    return family


def read_model(family: Family, settings: Settings, tensors: assemble.Tensors) -> ModelConfig:
    """The model of a config.json, with as many multi-token modules as the checkpoint holds.

    Raises:
      UserError: the config can't be meant, or is of another model by far.
    """
    try:
        config = family.read_config(settings)
    except UserError as error:
        if settings.where in str(error):
            raise
        raise UserError(
            f"{settings.where} describes no model that can be built: {error}"
        ) from error
    _check_size(config, settings, tensors)
    if family.multi_token is None:
        return config
    modules = 0
    while family.multi_token.replace("*", str(config.num_layers + modules)) in tensors.shapes:
        modules += 1
    if modules == 0:
        return config
    layer = config.pattern[-1]
    layer = dataclasses.replace(layer, attention=with_own_keys(layer.attention))
    multi_token = MultiTokenConfig(depth=modules, layer=layer)
    return dataclasses.replace(config, multi_token=multi_token)


def _check_size(config: ModelConfig, settings: Settings, tensors: assemble.Tensors) -> None:
    """Ends here what would take for ever later: tables have a line for each expert. What is missing
    of a model of about this size is told by name.
    """
    held = sum(math.prod(shape) for shape in tensors.shapes.values())
    if config.num_parameters > 2 * held + 2**20:
        raise UserError(
            f"{settings.where} describes a model of {config.num_parameters:,} parameters, and its "
            f"files hold {held:,}: config and tensors are of two models, or files are missing"
        )


def write_model(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, read back to see that it says all of it.

    Raises:
      UserError: the model does something that the family has no words for.
    """
    values = family.write_config(config)
    written = {"model_type": family.model_type, "architectures": [family.architecture], **values}
    again = family.read_config(Settings(written, "the exported config.json", family.defaults))
    lost = lost_settings(config, again)
    if lost:
        raise UserError(
            f"the family {family.model_type} can't say all that this model does: "
            f"{'; '.join(lost[:3])}. Choose another family, or keep the model as a run directory"
        )
    return written


def export_family(
    config: ModelConfig, wanted: str | None = None, own: Family | None = None
) -> Family:
    """The family whose config.json says all that the model does.

    Args:
      wanted: its model_type, if the caller knows.
      own: the family that the model came from; it is tried first.
    Raises:
      UserError: there is none.
    """
    families = [family for family in FAMILIES if wanted in (None, family.model_type)]
    families.sort(key=lambda family: family is not own)
    if not families:
        names = ", ".join(family.model_type for family in FAMILIES)
        raise UserError(f"family {wanted!r} is unknown: there are {names}")
    refusals: dict[str, str] = {}
    for family in families:
        try:
            write_model(family, config)
            return family
        except UserError as error:
            refusals[family.model_type] = str(error)
    nearest = own or min(families, key=lambda family: _layer_losses(family, config)[0])
    reason = refusals.get(nearest.model_type, next(iter(refusals.values())))
    more = [line for line in _layer_losses(nearest, config)[1] if line not in reason]
    shown_reasons = "; ".join([reason, *more[:3]])
    if wanted is not None:
        raise UserError(f"the family {wanted} does not hold this model ({shown_reasons})")
    raise UserError(
        f"no public family holds this model (the nearest is {nearest.model_type}: {shown_reasons})"
    )


def _layer_losses(family: Family, config: ModelConfig) -> tuple[int, list[str]]:
    """Settings of the model's kinds of layers, each by itself, that the family can't say: how many,
    and by name.
    """
    lost: dict[str, None] = {}
    unknown = 0
    for layer in dict.fromkeys((*config.prefix, *config.pattern)):
        if shares_keys(layer.attention):
            continue  # it is nothing by itself
        alone = dataclasses.replace(config, prefix=(), pattern=(layer,), multi_token=None)
        try:
            written = family.write_config(alone)
            settings = Settings(written, "the exported config.json", family.defaults)
            again = family.read_config(settings)
        except UserError:
            unknown += 1
            continue
        lost |= dict.fromkeys(_in_any_layer(line) for line in lost_settings(alone, again))
    return len(lost) + _UNKNOWN_LAYER * unknown, list(lost)


_UNKNOWN_LAYER = 100
"""Settings that a kind of layer counts as which the family has not."""


def _in_any_layer(difference: str) -> str:
    """The sentence without the layer's number."""
    return re.sub(r"^pattern\.\d+\.", "", difference)


def lost_settings(config: ModelConfig, again: ModelConfig) -> list[str]:
    """What a public form, read back as `again`, does not say of what the model does."""
    return differences(_function(config), _function(again))


def _function(config: ModelConfig) -> ModelConfig:
    """The config without what only training reads, and with each layer by itself."""

    def bare(ffn: FeedForward) -> FeedForward:
        if not isinstance(ffn, MoEConfig):
            return ffn
        router, defaults = ffn.router, RouterConfig(top_k=1)
        names = ("load_balance_weight", "sequence_weight", "entropy_weight", "z_loss_weight")
        weights: dict[str, Any] = {name: getattr(defaults, name) for name in names}
        if router.choice == "token":  # no loss goes with it
            weights = dict.fromkeys(names, 0.0)
        if router.balance != "none":
            weights |= {"balance": "loss_free", "bias_rate": 1e-3}
        return dataclasses.replace(ffn, router=dataclasses.replace(router, **weights, warmup=None))

    layers = (*config.prefix, *config.pattern * config.num_periods)
    layers = tuple(dataclasses.replace(layer, ffn=bare(layer.ffn)) for layer in layers)
    return dataclasses.replace(
        config, prefix=(), pattern=layers, multi_token=None, early_exit=None, exit_spacing=None
    )
