"""Adapters on public families: they change the logits, experts' part included; merged and written
in PEFT's form they are the same function, and PEFT itself computes it (recorded by record_peft.py).

Tolerances: 1e-5 between merged and unmerged, float32 both (the order of sums; measured below 6e-6
on logits of deviation 1, moved by more), or twice what the last bits of the merged weights move,
which Gemma 4's E models feel more; 1e-4 to PEFT, as between the base models (test_parity.py).
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoint.peft import CONFIG, read_peft, write_peft
from configs.checks import UserError
from infer.adapters import model_entries, model_forms, with_adapter
from infer.logits import full_logits
from infer.sources import open_source
from model.adapters import merge, target_of
from tests.checkpoint.cases import CASES, write_case
from tests.checkpoint.drawn_adapters import ALPHA, RANK, as_collection, draw_adapters
from tests.checkpoint.record_peft import CASES as READ_BY_PEFT
from tests.checkpoint.record_peft import drawn_for_peft
from tests.checkpoint.test_parity import loaded

TOLERANCE, TOLERANCE_TO_PEFT = 1e-5, 1e-4
FAST = ("deepseek_v3", "gpt_oss")
"""Every kind of matrix: absorbed, fused with its parts interleaved, dense and shared."""


def write(case: str, folder: Path, drawn=None) -> None:
    """The case's drawn adapters in PEFT's form."""
    model, _, public, _, _ = loaded(case)
    drawn = draw_adapters(model) if drawn is None else drawn
    entries = model_entries(model.config, public.family.rows)
    forms = model_forms(model.config)
    write_peft(folder, entries, forms, drawn, rank=RANK, alpha=ALPHA, base=case)


def with_other_last_bits(variables):
    """Each weight a last bit larger or smaller, drawn."""
    random = np.random.RandomState(0)

    def moved(x):
        x = np.asarray(x)
        if x.dtype != np.float32:
            return x
        return np.nextafter(
            x, np.where(random.rand(*x.shape) < 0.5, -np.inf, np.inf), dtype=x.dtype
        )

    return jax.tree.map(moved, variables)


@pytest.mark.parametrize(
    "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
@pytest.mark.sampled
def test_every_kind_of_matrix_moves_the_logits_and_merged_they_are_the_same(case):
    model, variables, _, tokens, plain = loaded(case)
    drawn = draw_adapters(model)
    adapters = as_collection(drawn, ALPHA / RANK)
    adapted = variables | {"adapters": adapters}
    logits = full_logits(model, adapted, tokens)
    whole = merge(model, adapted)
    merged = full_logits(model, whole, tokens)
    error = np.abs(merged - logits).max()
    if error > TOLERANCE * np.abs(logits).max():  # of the largest logit: sums in another order
        moved = np.abs(full_logits(model, with_other_last_bits(whole), tokens) - merged).max()
        assert error < min(2 * moved, 1e-4)
    kinds = {target_of(tuple(name.split("."))) for name in drawn}
    has_experts = any("'moe'" in str(path) for path, _ in jax.tree.leaves_with_path(variables))
    assert ("experts" in kinds) == has_experts
    for kind in kinds:

        def only(path, x, kind=kind):
            return x if target_of(tuple(key.key for key in path[:-1])) == kind else 0 * x

        alone = jax.tree_util.tree_map_with_path(only, adapters)
        moved = full_logits(model, variables | {"adapters": alone}, tokens) - plain
        assert np.abs(moved).max() > 0.1, kind


@pytest.mark.parametrize(
    "case",
    [c if c in (*FAST, "granitemoe") else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
)
@pytest.mark.sampled
def test_written_in_pefts_form_and_read_back_the_products_are_the_same(case, tmp_path):
    model, _, public, _, _ = loaded(case)
    drawn, forms = draw_adapters(model), model_forms(model.config)
    entries = model_entries(model.config, public.family.rows)
    if any(e.is_partial and e.leaf.removeprefix("params.") in drawn for e in entries):
        with pytest.raises(UserError, match=r"are cut differently, .*: merge it into the weights"):
            write(case, tmp_path, drawn)
        return
    write(case, tmp_path, drawn)
    back = read_peft(tmp_path, entries, forms)
    assert back.keys() == drawn.keys()
    for name, (a, b) in drawn.items():
        form = forms[name]
        expected, found = (product(form, *x) for x in ((a, ALPHA / RANK * b), back[name]))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def product(form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, by loops over what is stacked and the parts."""
    made = np.zeros(form.shape, np.float64)
    first = form.stack + form.inputs
    for stack in np.ndindex(*form.shape[: form.stack]):
        for part in np.ndindex(*form.shape[first : first + form.parts]):
            own_a = a[stack][(*[slice(None)] * form.inputs, *part)]
            place = (*stack, *[slice(None)] * form.inputs, *part)
            made[place] = np.tensordot(own_a, b[(*stack, *part)], 1)
    return made


@pytest.mark.parametrize(
    "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in READ_BY_PEFT]
)
def test_peft_computes_the_same_with_the_adapter(case, tmp_path):
    model, variables, _, tokens, plain = loaded(case)
    drawn = drawn_for_peft(case, model)
    adapted = variables | {"adapters": as_collection(drawn, ALPHA / RANK)}
    with np.load(Path(__file__).parent / "peft_logits.npz") as recorded:
        expected = recorded[case]
    assert np.abs(expected - plain).max() > 1
    np.testing.assert_allclose(
        full_logits(model, adapted, tokens), expected, atol=TOLERANCE_TO_PEFT
    )


def test_what_is_no_adapter_of_the_model_is_refused_in_a_sentence(tmp_path):
    case = "qwen2_moe"
    source = open_source(str(folder_of(case, tmp_path)))
    with pytest.raises(UserError, match=r"holds no adapter_config\.json: give the folder"):
        with_adapter(source, tmp_path)
    write(case, tmp_path / "adapter")
    with_adapter(source, tmp_path / "adapter")
    other = open_source(str(folder_of("llama", tmp_path)))
    with pytest.raises(
        UserError, match=r"tensors that no matrix of this model takes|of another model"
    ):
        with_adapter(other, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    for change, sentence in (
        ({"peft_type": "IA3"}, "has peft_type='IA3', only 'LORA' is read"),
        ({"use_dora": True}, "uses use_dora, which is not read"),
        ({"lora_alpha": "much"}, "has lora_alpha='much', expected a number"),
    ):
        (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=sentence):
            with_adapter(source, tmp_path / "adapter")


def folder_of(case: str, tmp_path: Path) -> Path:
    write_case(case, tmp_path / case)
    return tmp_path / case
