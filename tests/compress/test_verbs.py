"""The verbs prune and quantize: every form of target, going on, refusals, others' readings."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf as public
import jax
import numpy as np
import pytest

from compress import pruning, rounding
from compress.grids import Grid
from configs.checks import UserError
from formats.packed_ints import pack_ints, unpack_ints
from infer.logits import full_logits
from infer.sources import open_source
from infer.verify import has_transformers, transformers_logits
from kernels.quantize import QTensor, dequantize
from scripts import large_to_small, prune, quantize
from scripts.compression import parsed_budget
from tests.compress import models

TOKENS = [1, 17, 250, 33, 8, 90, 4, 299, 12, 60]
SMALL = ["--calibration-tokens", "256", "--held-out-tokens", "256", "--length", "32"]
FORMS = {"gguf": "small.gguf", "huggingface": "small", "orbax": "small"}
PEER = Path(__file__).parents[1] / "checkpoint" / "llama_peer.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model folder "model" and a text."""
    folder = tmp_path_factory.mktemp("verbs")
    models.write_folder(folder / "model")
    models.write_text(folder / "text.txt")
    return folder


def arguments(place: Path, target: Path, *more: str) -> list[str]:
    return [str(place / "model"), str(target), "--text", str(place / "text.txt"), *SMALL, *more]


def logits_of(path: Path) -> np.ndarray:
    return full_logits(*open_source(str(path)).load(), TOKENS)


@pytest.mark.parametrize("form", FORMS)
def test_a_pruned_model_is_an_ordinary_one_in_every_form(form, place, tmp_path, capsys):
    target = tmp_path / FORMS[form]
    report = tmp_path / "report.json"
    more = ["--keep", "0.7", "--to", form, "--report", str(report)]
    assert prune.main(arguments(place, target, *more)) == 0
    source = open_source(str(target))
    record = json.loads(report.read_text())
    assert source.config.num_parameters == record["parameters"][1] < record["parameters"][0]
    assert source.tokenizer().encode("hello world")
    assert np.isfinite(logits_of(target)).all()
    shown = capsys.readouterr().out
    assert "nats" in shown
    assert "heads 4 -> " in shown
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("form", "weights"),
    [("gguf", "int8"), ("gguf", "int4"), ("gguf", "int4_affine")]
    + [(form, w) for form in ("huggingface", "orbax") for w in ("int8", "int4", "fp8")],
)
def test_a_file_holds_the_codes_that_rounding_chose(form, weights, place, tmp_path):
    """What is read back is the rounded model: no format rounds it again."""
    target = tmp_path / FORMS[form]
    made: list = []
    keep_round = functools.partial(_keeping, made, rounding.round_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.quantization.round_model", keep_round)
        more = ["--weights", weights, "--method", "gptq", "--to", form]
        assert quantize.main(arguments(place, target, *more)) == 0
    source = open_source(str(target))
    _, found = source.load()
    config, expected = made[-1].assembled()
    assert dataclasses.replace(source.config, norm_eps=config.norm_eps) == config
    is_plain_end = form == "huggingface"
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found["params"]), jax.tree.leaves(expected["params"]), strict=True
    ):
        values = y.part((None,) * len(y.shape)) if hasattr(y, "part") else np.asarray(y)
        is_rounded = hasattr(y, "part")
        assert is_rounded == (x.ndim > 1 + ("periods" in str(path)) and not (
            is_plain_end and "embedding" in str(path)
        ))  # fmt: skip
        atol = 1e-6 if is_rounded else 0.02
        np.testing.assert_allclose(
            np.asarray(x), values, atol=atol, rtol=1e-6 if is_rounded else 0.01
        )


def _keeping(made, make, *args, **kwargs):
    made.append(make(*args, **kwargs))
    return made[-1]


def test_gguf_blocks_are_llama_cpps(place, tmp_path):
    """By the public package's reading, of every kind; tensors at multiples of 32 bytes."""
    for weights, kind in (("int8", "Q8_0"), ("int4", "Q4_0"), ("int4_affine", "Q4_1")):
        target = tmp_path / f"{weights}.gguf"
        assert quantize.main(arguments(place, target, "--weights", weights)) == 0
        reader = public.GGUFReader(target)
        tensors = {t.name: t for t in reader.tensors}
        found = tensors["blk.0.ffn_up.weight"]
        assert found.tensor_type.name == kind
        assert all(t.data_offset % 32 == 0 for t in reader.tensors)
        assert open_source(str(target)).is_in_four_bits == (weights != "int8")
        ours = open_source(str(target)).load()[1]["params"]["periods"]["layer_0"]["ffn"]["gate_up"]
        theirs = public.quants.dequantize(found.data, found.tensor_type)
        np.testing.assert_allclose(np.asarray(ours)[0, :, 1].T, theirs, atol=1e-6)


@pytest.mark.parametrize("kind", ["int4", "int4_affine"])
def test_what_a_file_has_in_four_bits_is_kept_in_memory(kind, place, tmp_path, monkeypatch):
    """GPTQ's codes, which need not reach a block's ends, are found again but for scales of 8 bits;
    without offsets those of an affine file are rounded a second time."""
    monkeypatch.setattr("infer.weights.SMALLEST", 0)
    target = tmp_path / "small.gguf"
    assert quantize.main(arguments(place, target, "--weights", kind, "--method", "gptq")) == 0
    source = open_source(str(target))
    assert source.is_in_four_bits
    assert not source.with_variables(source.config, {}, "").is_in_four_bits
    exact = source.load(for_decoding=True)[1]["params"]
    errors = {}
    for weights in ("int4", "int4_affine"):
        held = source.load(weights=weights)[1]["params"]
        off = [
            np.sqrt(np.square(np.asarray(dequantize(q)) - x).mean() / np.square(x).mean())
            for q, x in zip(_weights(held), _weights(exact, like=held), strict=True)
            if q.format == "int4"
        ]
        assert len(off) >= 8
        errors[weights] = max(off)
    assert errors["int4_affine"] < 0.004
    assert kind == "int4" or errors["int4"] > 0.04


def _weights(tree, like=None):
    """The weights of few bits, or those in their places."""
    places = jax.tree.leaves(
        jax.tree.map(lambda x: isinstance(x, QTensor), like or tree, is_leaf=_is_quantised)
    )
    leaves = jax.tree.leaves(tree, is_leaf=_is_quantised)
    return [x for x, is_place in zip(leaves, places, strict=True) if is_place]


def _is_quantised(x) -> bool:
    return isinstance(x, QTensor)


def test_folders_bytes_are_a_quarter_and_an_eighth(place, tmp_path, capsys):
    """int8 <= 0.26 and int4 <= 0.14 of float32's, as their formats' bits say."""
    report = tmp_path / "report.json"
    for weights, bits, share in (("int8", 8.25, 0.26), ("int4", 4.25, 0.14)):
        grid = Grid(weights, 64, "bfloat16")
        assert grid.bits_per_weight(576) == bits
        assert bits / 32 <= share
        target = tmp_path / weights
        more = ["--weights", weights, "--vocabulary", weights, "--report", str(report)]
        assert quantize.main(arguments(place, target, *more)) == 0
        record = json.loads(report.read_text())
        arrays = list((target / "rounded").glob("*.npy"))
        stored = sum(np.load(a, mmap_mode="r").nbytes for a in arrays)
        assert stored == record["weight_bytes"]
        assert f"{record['ratio']:.3f} of float32's" in capsys.readouterr().out


def test_mixed_weights_meet_a_budget(place, tmp_path):
    report = tmp_path / "report.json"
    target = tmp_path / "mixed.gguf"
    more = ["--weights", "mixed", "--budget", "0.02MB", "--report", str(report)]
    assert quantize.main(arguments(place, target, *more)) == 0
    record = json.loads(report.read_text())
    assert 0.9 * 20_000 < record["weight_bytes"] <= 20_000
    assert len(record["bits"]) > 2
    target = tmp_path / "nats"
    more = ["--budget", "0.001nats", "--report", str(report)]
    assert quantize.main(arguments(place, target, *more)) == 0
    record = json.loads(report.read_text())
    assert record["lost"] <= 0.001
    assert record["ratio"] < 0.5
    with pytest.raises(UserError, match="smallest assignment"):
        quantize.main(arguments(place, tmp_path / "no", "--weights", "mixed", "--budget", "1KB"))


def test_an_interrupted_pass_goes_on(place, tmp_path, monkeypatch):
    """Killed after a layer: the same command measures, and rounds, the others alone."""
    target, saved = tmp_path / "small.gguf", []

    def fails(folder, name, arrays, save=pruning.save_arrays):
        save(folder, name, arrays)
        saved.append(name)
        if len(saved) == 1:
            raise KeyboardInterrupt

    for verb, module, more in (
        (prune, pruning, ["--keep", "0.7"]),
        (quantize, rounding, ["--weights", "int4", "--method", "gptq"]),
    ):
        saved.clear()
        monkeypatch.setattr(module, "save_arrays", fails)
        with pytest.raises(KeyboardInterrupt):
            verb.main(arguments(place, target, *more))
        assert not target.exists()
        assert (tmp_path / "small.gguf.work.partial" / "layer_0.npz").exists()
        assert verb.main(arguments(place, target, *more)) == 0
        assert saved.count("layer_0") == 1
        assert target.exists()
        target.unlink()


@pytest.mark.parametrize(
    ("verb", "more", "sentence"),
    [
        (prune, [], "nothing is to go"),
        (prune, ["--keep", "0.5", "--parameters", "9k"], "name one of"),
        (prune, ["--keep", "0.5", "--axes", "toes"], "must be of"),
        (prune, ["--experts", "0.5"], "no experts"),
        (prune, ["--dense", "2"], "no experts"),
        (prune, ["--layers", "7"], "between 1 and"),
        (prune, ["--keep", "0.5", "--merge"], "--merge goes with"),
        (quantize, [], "name --weights .*, or a --budget"),
        (quantize, ["--weights", "mixed"], "a budget goes with"),
        (quantize, ["--weights", "int4", "--budget", "2MB"], "a budget goes with"),
        (quantize, ["--weights", "int4", "--budget", "much"], "must be nats or bytes"),
        (quantize, ["--weights", "int4_affine"], "Q4_1"),
        (quantize, ["--weights", "bfloat16", "--method", "gptq"], "no effect"),
        (quantize, ["--weights", "int4", "--to", "gguf"], "don't go together"),
        (quantize, ["--weights", "int8", "--to", "huggingface", "--vocabulary", "int8"], "stay in"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(verb, more, sentence, place, tmp_path):
    with pytest.raises(UserError, match=sentence):
        verb.main(arguments(place, tmp_path / "small", *more))
    assert not list(tmp_path.iterdir())


def test_an_arm_that_is_none_is_told():
    with pytest.raises(UserError, match="there is no arm 'nothing': take of drawn, alone"):
        large_to_small.main(["smollm2", "--arms", "drawn, teacher;nothing"])


def test_fp8_is_no_format_of_llama_cpp(place, tmp_path):
    with pytest.raises(UserError, match="no fp8"):
        quantize.main(arguments(place, tmp_path / "a.gguf", "--weights", "fp8"))


def test_a_target_that_is_there_is_left_alone(place, tmp_path):
    target = tmp_path / "taken.gguf"
    target.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        prune.main(arguments(place, target, "--keep", "0.7"))
    assert target.read_text() == "mine"


def test_budgets_are_written_as_people_do():
    assert parsed_budget("0.02nats") == {"budget_nats": 0.02}
    assert parsed_budget("1.5GB") == {"budget_bytes": 1_500_000_000}


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_come_back(bits):
    half = 1 << (bits - 1)
    codes = np.arange(-half, half).astype(np.int8).reshape(2, -1)
    packed = pack_ints(codes, bits)
    assert packed.dtype == np.int32
    assert packed[0, 0] & (2**bits - 1) == 0, "the least code is 0"
    np.testing.assert_array_equal(unpack_ints(packed, bits), codes)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_half_in_every_form(form, place, tmp_path):
    target, report = tmp_path / FORMS[form], tmp_path / "report.json"
    more = ["--weights", "bfloat16", "--to", form, "--report", str(report)]
    assert quantize.main(arguments(place, target, *more)) == 0
    record = json.loads(report.read_text())
    assert 0.5 <= record["ratio"] < 0.51
    assert record["quality"]["divergence"] > 0
    exact = open_source(str(place / "model")).load()[1]["params"]["periods"]["layer_0"]["ffn"]
    found = open_source(str(target)).load()[1]["params"]["periods"]["layer_0"]["ffn"]
    halved = exact["down"].astype("bfloat16").astype("float32")
    np.testing.assert_array_equal(found["down"], halved)


@pytest.mark.slow
def test_the_chain_goes_on_where_it_was(place, tmp_path):
    """From a model to its files by processes of their own, and at once when all is done."""
    run = [sys.executable, "-m", "scripts.large_to_small", str(place / "model"), "--short"]
    run += ["--text", str(place / "text.txt"), "--run-dir", str(tmp_path / "chain")]
    run += ["--arms", "pruned, own texts;experts, teacher"]
    run += ["--tasks", "line_completion", "--limit", "2"]
    for _ in range(2):
        done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "chain" / "stages.json").read_text())
    arms = ["pruned, own texts", "experts, teacher"]
    assert list(stages) == ["source", "pruned", "distilled", *arms, "int8", "int4"]
    assert stages["pruned, own texts"]["parameters"] == stages["pruned"]["parameters"]
    experts = open_source(stages["experts, teacher"]["path"]).config
    dense = open_source(stages["pruned"]["path"]).config
    assert experts.layer_kinds[0].ffn.num_experts == 8
    assert experts.num_parameters > dense.num_parameters
    routers = experts.num_layers * 8 * experts.d_model
    assert experts.num_active_parameters <= dense.num_active_parameters + routers
    assert stages["pruned"]["parameters"] < stages["source"]["parameters"]
    assert (tmp_path / "chain" / "report.html").exists()
    assert "measuring" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_transformers_reads_compressed_tensors(weights, place, tmp_path):
    target = tmp_path / "small"
    more = ["--weights", weights, "--to", "huggingface"]
    assert quantize.main(arguments(place, target, *more)) == 0
    if not has_transformers(open_source(str(target))):
        pytest.skip("needs torch and transformers")
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("needs compressed-tensors")
    theirs = transformers_logits(target, TOKENS)
    np.testing.assert_allclose(theirs, logits_of(target), atol=0.05)  # it computes in bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4", "int4_affine"])
def test_llama_cpp_reads_the_codes(weights, place, tmp_path):
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python")
    target, out = tmp_path / "small.gguf", tmp_path / "out.npy"
    assert quantize.main(arguments(place, target, "--weights", weights)) == 0
    command = [sys.executable, str(PEER), str(target), str(out), "logits", *map(str, TOKENS)]
    subprocess.run(command, check=True, cwd=tmp_path)
    # It rounds activations to 8 bits.
    np.testing.assert_allclose(np.load(out), logits_of(target), atol=0.1)
