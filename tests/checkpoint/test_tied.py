"""Tied embeddings beside an output layer in the files (transformers loads either)."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint import huggingface
from configs.checks import UserError
from infer.convert import Conversion, convert
from infer.logits import full_logits
from infer.sources import open_source
from tests.checkpoint.cases import write_case

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def write_tied(folder: Path, case: str, *, head: str | None = None) -> np.ndarray:
    """A tied model; with `head`, an output layer beside it that is equal or not. Its tokens."""
    tokens, _ = write_case(case, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"tie_word_embeddings": false', TIE))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(HEAD, None)
    if head is not None:
        tensors[HEAD] = tensors[EMBEDDING] + (0.01 if head == "other" else 0.0)
    save_file(tensors, folder / "model.safetensors")
    return tokens


TIE = '"tie_word_embeddings": true'


@pytest.mark.parametrize("case", ["smollm2", "mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.thinned(2)
def test_an_equal_output_layer_is_passed_over(case: str, tmp_path: Path):
    tokens = write_tied(tmp_path / "without", case).tolist()
    write_tied(tmp_path / "with", case, head="equal")
    logits = [
        full_logits(*open_source(str(tmp_path / name)).load(), tokens)
        for name in ("without", "with")
    ]
    np.testing.assert_array_equal(*logits)
    convert(open_source(str(tmp_path / "with")), tmp_path / "out", Conversion(to="huggingface"))
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    assert huggingface.open_checkpoint(tmp_path / "out").config.tie_embeddings


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_another_output_layer_is_refused(to, tmp_path: Path):
    write_tied(tmp_path / "it", "smollm2", head="other")
    source = open_source(str(tmp_path / "it"))
    with pytest.raises(
        UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
    ):
        source.load()
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        convert(source, tmp_path / "out", Conversion(to=to))


def test_an_output_layer_of_another_shape_is_refused(tmp_path: Path):
    write_tied(tmp_path / "it", "smollm2")
    tensors = load_file(tmp_path / "it" / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING][:5]
    save_file(tensors, tmp_path / "it" / "model.safetensors")
    with pytest.raises(UserError, match="differs from"):
        open_source(str(tmp_path / "it")).load()


def test_multi_token_modules_repeat_the_embedding_of_a_tied_model(tmp_path: Path):
    write_tied(tmp_path / "it", "deepseek_v3")
    tensors = load_file(tmp_path / "it" / "model.safetensors")
    layer, module = "model.layers.1.", "model.layers.2."
    tensors |= {k.replace(layer, module): v for k, v in tensors.items() if layer in k}
    width = tensors[EMBEDDING].shape[1]
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{module}{norm}.weight"] = np.ones(width, np.float32)
    tensors[f"{module}eh_proj.weight"] = np.ones((width, 2 * width), np.float32)
    for copy in ("embed_tokens", "shared_head.head"):
        tensors[f"{module}{copy}.weight"] = tensors[EMBEDDING]
    save_file(tensors, tmp_path / "it" / "model.safetensors")
    convert(open_source(str(tmp_path / "it")), tmp_path / "out", Conversion(to="huggingface"))
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
