"""A model from one form into another: Hugging Face's, GGUF, or our own folder."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

from checkpoint import gguf, huggingface
from checkpoint.export_dtype import DTYPES, ExportDtype, choose_storage
from checkpoint.families.base import Family, no_gguf
from checkpoint.model_folder import write_model_folder
from checkpoint.public import export_family, find_family
from configs.checks import require, require_positive
from data.tokenizers.gguf_tokenizer_write import told_difference
from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.tokenizer_export import (
    OTHER_FORMS,
    copy_tokenizer,
    exported_token_ids,
    generation_settings,
    write_public_tokenizer,
)
from formats.atomic_folder import partial_file, partial_folder
from formats.gguf.writer import Quantization
from infer.adapters import export_adapter
from infer.sources import Progress, Source, counted

Form = Literal["huggingface", "gguf", "orbax", "peft"]


def form_of(target: Path, named: Form | None) -> Form:
    """What is made: what was named, else a GGUF where the target's name ends so, our own else."""
    return named or ("gguf" if target.suffix == ".gguf" else "orbax")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to make of a source."""

    to: Form
    family: str | None = None
    """model_type of the public family; None finds one that fits."""
    dtype: ExportDtype | None = None
    """Of the tensors written; None keeps the source's, bfloat16 for packed ones. float8 and mxfp4
    are Hugging Face's only; GGUF has `quantization` instead."""
    quantization: Quantization | None = None
    """GGUF only, F16 if None."""
    max_shard_bytes: int = 5_000_000_000
    """Hugging Face only: of one file."""

    def __post_init__(self) -> None:
        require_positive(self, "max_shard_bytes")


def convert(
    source: Source,
    target: Path,
    conversion: Conversion,
    *,
    reading: Progress = lambda done, total: None,
    writing: Progress = lambda done, total: None,
    notes: Callable[[str], None] = lambda _: None,
) -> None:
    """Writes the target, whole or not at all; a kept part of an interrupted one is gone on with.

    A public checkpoint is never in memory as a whole on its way to a public form: tensors are read
    as those to write ask for them.

    Args:
      notes: is told what of the source is left out.
    Raises:
      UserError: the source can't be read, the target is there, or the form can't hold the model.
    """
    if conversion.to == "peft":
        _check_adapter_alone(source, conversion)
        notes(f"the names are those of {export_adapter(source.path, target).model_type}")
        return
    family = export_family_of(source, target, conversion)
    dtype = conversion.dtype or kept_dtype(source)
    is_halved = dtype == "bfloat16" and conversion.to != "gguf"
    loaded_as = "bfloat16" if is_halved else "float32"
    # Weights convert without one, too.
    tokenizer = source.tokenizer() if has_tokenizer(source) else None
    if tokenizer is None:
        notes(_without_tokenizer(source, conversion.to))
    elif conversion.to == "gguf" and (difference := told_difference(tokenizer)):
        notes(difference)
    written = counted(writing, source.config.num_parameters)
    fingerprint = _fingerprint(source, conversion, dtype)
    if conversion.to == "gguf":
        assert family is not None
        with partial_file(target, fingerprint) as path:
            config, variables = source.load_or_leave(dtype=loaded_as, progress=reading)
            kind = conversion.quantization or "F16"
            gguf.export(path, family, config, variables, tokenizer, kind, written)
        return
    with partial_folder(target, fingerprint) as folder:
        _copy_tokenizer(source, tokenizer, folder)
        if family is None:
            if source.held is not None:
                variables = source.held
            else:
                _, variables = source.load(dtype=loaded_as, progress=reading)
            write_model_folder(folder, source.config, variables)
            return
        config, variables = source.load_or_leave(dtype=loaded_as, progress=reading)
        huggingface.export(
            folder,
            family,
            config,
            variables,
            dtype=dtype,
            extra=exported_token_ids(_folder(source), tokenizer),
            generation=generation_settings(_folder(source)),
            like=_quantization(source),
            max_shard_bytes=conversion.max_shard_bytes,
            progress=written,
        )


def _check_adapter_alone(source: Source, conversion: Conversion) -> None:
    require(
        source.kind == "run",
        f"{source.name} is no run, and --to peft writes the adapters of one: name its folder",
    )
    require(
        conversion.dtype is None and conversion.family is None and conversion.quantization is None,
        "--to peft writes float32 with the names of the source's own family: leave dtype, family "
        "and quantization out",
    )


def export_family_of(source: Source, target: Path, conversion: Conversion) -> Family | None:
    """The public family to write, None for our own form.

    Raises:
      UserError: the conversion does not fit the source or the target; nothing is read for it.
    """
    to, dtype = conversion.to, conversion.dtype
    require(
        (to == "gguf") == (target.suffix == ".gguf"),
        f"{target} and the form {to!r} don't go together: a GGUF is a file that ends in .gguf, "
        "everything else a folder",
    )
    require(
        to == "gguf" or conversion.quantization is None,
        f"quantization={conversion.quantization!r} is of a GGUF, not of {to}: leave it out",
    )
    if to == "orbax":
        require(
            dtype is None or dtype in ("float32", "bfloat16"),
            f"{dtype} is a form of huggingface folders only, not of orbax: leave it out, or take "
            "huggingface",
        )
        require(conversion.family is None, "orbax holds any model: leave the family out")
        return None
    own = find_family(source.public.settings) if source.public is not None else None
    family = export_family(source.config, conversion.family, own)
    if to == "huggingface":
        choose_storage(family, dtype or kept_dtype(source), _quantization(source))
        return family
    if to == "gguf":
        require(
            dtype is None,
            f"{dtype} is a form of huggingface folders only, not of gguf: a GGUF has a "
            "quantization",
        )
        require(family.gguf is not None, no_gguf(family.model_type))
        return family
    assert to != "peft", "it has a way of its own"
    assert_never(to)


def kept_dtype(source: Source) -> ExportDtype:
    """That of a Hugging Face source; bfloat16 for its packed formats, float32 for all others."""
    if source.kind != "huggingface" or source.public is None:
        return "float32"
    settings = source.public.settings
    if "quantization_config" in settings:
        return "bfloat16"
    return settings.text("dtype", "torch_dtype", choices=tuple(DTYPES), default="float32")


def _quantization(source: Source) -> Mapping[str, Any] | None:
    """config.json's quantization_config, of a source that has one."""
    public = source.public if source.kind == "huggingface" else None
    quant_config = public.settings.part("quantization_config") if public is not None else None
    return quant_config.values if quant_config is not None else None


def rounding(source: Source, conversion: Conversion) -> str | None:
    """The form that the target rounds the source's values to: a dtype or a GGUF's quantization;
    None where it holds them.
    """
    if conversion.to == "gguf":
        return conversion.quantization or "F16"
    dtype = conversion.dtype or kept_dtype(source)
    is_own = dtype == kept_dtype(source) and _quantization(source) is None
    return None if is_own or dtype == "float32" else dtype


def has_tokenizer(source: Source) -> bool:
    """Whether there is one to read, of whatever kind."""
    folder = _folder(source)
    if folder is not None:
        return (folder / "tokenizer.json").exists()
    return source.kind == "run" or gguf.has_tokenizer(source.path)


def _folder(source: Source) -> Path | None:
    """The folder that holds the tokenizer's files, of a source that has one."""
    return source.path if source.kind in ("huggingface", "model_folder") else None


def _without_tokenizer(source: Source, to: Form) -> str:
    folder = _folder(source)
    others = [name for name in OTHER_FORMS if folder is not None and (folder / name).is_file()]
    if not others:
        return f"{source.name} has no tokenizer: the model is written without one"
    copied = "left out" if to == "gguf" else "copied, and read by nothing here"
    return (
        f"{source.name} has its tokenizer as {', '.join(others)} alone, {copied}: save it as "
        "tokenizer.json with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) "
        "and convert again"
    )


def _copy_tokenizer(source: Source, tokenizer: PublicTokenizer | None, folder: Path) -> None:
    path = _folder(source)
    if path is not None:
        copy_tokenizer(path, folder, tokenizer)
    elif tokenizer is not None:
        write_public_tokenizer(folder, tokenizer)


def _fingerprint(source: Source, conversion: Conversion, dtype: str) -> str:
    """Of everything that the result depends on: another one begins afresh."""
    text = json.dumps([source_fingerprint(source), repr(conversion), dtype])
    return hashlib.sha256(text.encode()).hexdigest()


def source_fingerprint(source: Source) -> str:
    """Of a source's files, by their names, sizes and dates, and of how it was changed since."""
    if source.path.is_dir():
        files = sorted(source.path.rglob("*"))
    else:
        assert source.public is not None
        tensors = source.public.tensors
        files = sorted({tensors.file(name) for name in tensors.shapes})
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(json.dumps([stats, source.made_by]).encode()).hexdigest()
