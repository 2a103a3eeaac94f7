"""Our models in lm-evaluation-harness; what needs it is skipped where it is not installed."""

import importlib.util
import json
import sys
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs.base import ExecutionConfig
from configs.checks import UserError
from data.pipeline import prepare_corpus
from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.tokenizer import end_of_text_id
from evals import lm_eval_model
from evals.lm_eval_model import HarnessModel, prompt, spelled_specials
from model.transformer import Transformer, hidden_states, output_weights
from scripts import lm_eval as verb
from tests import tiny
from tests.probes import drawn

LONGEST = 40
TEMPLATE = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason=f"lm-evaluation-harness is not installed ({lm_eval_model.INSTALL})",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PublicTokenizer:
    folder = tmp_path_factory.mktemp("corpus")
    tiny.write_sources(folder)
    made = prepare_corpus(tiny.run(folder).data, 300).tokenizer()
    made.encode_special_tokens = True
    end = end_of_text_id(made)
    return PublicTokenizer(made, end, frozenset({end}), add_bos=True, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def loaded(tokenizer):
    model = Transformer(tiny.model(vocab_size=300), ExecutionConfig(compute_dtype="float32"))
    return model, drawn(model.config)


@pytest.fixture
def source(monkeypatch, tokenizer, loaded):
    """A source named "tiny"."""

    def load(**settings):
        assert settings["for_decoding"]
        return loaded

    found = SimpleNamespace(load=load, tokenizer=lambda: tokenizer)
    monkeypatch.setattr(lm_eval_model, "open_source", lambda name: found)


def request(*arguments):
    return SimpleNamespace(args=arguments)


@partial(jax.jit, static_argnums=3)
def dense_log_p(variables, tokens, positions, model):
    hidden, _ = hidden_states(model, variables, tokens, positions)
    return jax.nn.log_softmax(hidden @ output_weights(model, variables))


def dense_nats(loaded, tokenizer, context: str, continuation: str) -> float:
    """-log p of a continuation, from the logits of one pass over both."""
    model, variables = loaded
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    tokens, positions = np.zeros((1, LONGEST), np.int32), np.full((1, LONGEST), -1, np.int32)
    tokens[0, : len(whole)], positions[0, : len(whole)] = whole, np.arange(len(whole))
    log_p = np.asarray(dense_log_p(variables, tokens, positions, model), np.float64)[0]
    return -sum(log_p[i - 1, whole[i]] for i in range(len(before), len(whole)))


def test_likelihoods_are_those_of_the_dense_model(source, loaded, tokenizer):
    model = HarnessModel("tiny")
    pairs = [("def total", "(x):\n"), ("total = ", "0\n    return"), ("a", " b")]
    found = model.loglikelihood([request(*pair) for pair in pairs])
    for (nats, is_greedy), pair in zip(found, pairs, strict=True):
        context, continuation = pair
        kept = context.rstrip()  # blanks go to the continuation, as in the harness
        expected = dense_nats(loaded, tokenizer, kept, context[len(kept) :] + continuation)
        assert nats == pytest.approx(-expected, abs=1e-3)
        assert isinstance(is_greedy, bool)


def test_rolling_is_the_likelihood_of_the_text_after_its_beginning(source):
    model = HarnessModel("tiny")
    (whole,) = model.loglikelihood_rolling([request("def total(x):\n")])
    ((alone, _),) = model.loglikelihood([request("", "def total(x):\n")])
    assert whole == pytest.approx(alone, abs=1e-3)


def test_answers_end_at_stops_and_go_into_the_harnesss_cache(source):
    model = HarnessModel("tiny")
    kept = []
    model.cache_hook = SimpleNamespace(add_partial=lambda *entry: kept.append(entry))
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False}
    (whole,) = model.generate_until([request("total = ", settings)])
    assert kept == [("generate_until", ("total = ", settings), whole)]
    assert len(whole) > 1
    stop = whole[1]
    (cut,) = model.generate_until([request("total = ", settings | {"until": [stop]})])
    assert cut == whole[: whole.index(stop)]


def test_chat_templates_are_rendered_and_their_special_tokens_read(source, tokenizer):
    model = HarnessModel("tiny")
    history = [{"role": "user", "content": "total"}]
    text = model.apply_chat_template(history)
    assert text == "<|endoftext|>user: total\nassistant:"
    ids = model.local.tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1  # the template's own, and not one more
    assert tokenizer.bos_id not in tokenizer.encode(text, bos=False)
    begun = [*history, {"role": "assistant", "content": "I say"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith("I say")
    assert model.chat_template(True) == TEMPLATE
    with pytest.raises(UserError, match="a model has one template here"):
        model.chat_template("other")


def test_a_text_without_special_tokens_begins_as_the_model_wants(tokenizer):
    reads = spelled_specials(tokenizer)
    assert reads.encode("total") == tokenizer.encode("total")
    assert reads.encode("total", bos=False) == tokenizer.encode("total", bos=False)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ((), 99, 0.0, 1.0)),
        ({"until": "\n"}, (("\n",), 99, 0.0, 1.0)),
        ({"until": ["\n", ""], "max_gen_toks": 5}, (("\n",), 5, 0.0, 1.0)),
        ({"max_new_tokens": 7, "do_sample": False, "temperature": 0.7}, ((), 7, 0.0, 1.0)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, ((), 99, 0.7, 0.9)),
        ({"num_beams": 1, "top_k": 0}, ((), 99, 0.0, 1.0)),
    ],
)
def test_settings_of_generation(settings, wanted):
    made = prompt("0", "text", settings, 99)
    assert (made.stops, made.max_new_tokens, made.temperature, made.top_p) == wanted


def test_settings_that_would_be_ignored_are_refused():
    with pytest.raises(UserError, match="settings num_beams, typical_p are not known here"):
        prompt("0", "text", {"typical_p": 0.9, "num_beams": 4}, 99)


def test_arguments_that_a_model_cannot_have(source):
    with pytest.raises(UserError, match="name a model: --model_args source=smollm2"):
        HarnessModel()
    with pytest.raises(UserError, match="dtype=float64 must be one of"):
        HarnessModel("tiny", dtype="float64")


def test_without_the_harness_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    lm_eval_model.model_class.cache_clear()
    with pytest.raises(UserError, match=r"is not installed here .*pip install lm-eval==0\.4\.13"):
        verb.main(["ls", "tasks"])


def test_options_of_the_mesh_are_ours():
    theirs = ["run", "--model", "moesaic"]
    assert verb._split([*theirs, "--mesh.expert", "2", "--mesh.data=4", "--limit", "3"]) == (
        ["--mesh.expert", "2", "--mesh.data=4"],
        [*theirs, "--limit", "3"],
    )


@needs_harness
def test_the_harness_own_models_stay_known():
    from lm_eval.api.registry import get_model, model_registry

    lm_eval_model.register()
    assert issubclass(get_model(lm_eval_model.NAME), HarnessModel)
    assert "hf" in model_registry.keys()  # noqa: SIM118


@needs_harness
def test_a_task_of_the_harness_runs_on_a_local_data_set(
    source, loaded, tokenizer, tmp_path, monkeypatch
):
    """acc is what the dense model's likelihoods say."""
    questions = [
        {"question": f"total {i}", "choices": ["= 0", "return", "x"], "answer": i % 3}
        for i in range(6)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    task = {
        "task": "tiny_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    verb.main(
        [
            *("run", "--model", "moesaic", "--model_args", "source=tiny"),
            *("--tasks", "tiny_questions", "--include_path", str(tmp_path)),
            *("--output_path", str(tmp_path / "out")),
        ]
    )
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]["tiny_questions"]
    right = [
        int(
            np.argmin([dense_nats(loaded, tokenizer, q["question"], f" {c}") for c in q["choices"]])
            == q["answer"]
        )
        for q in questions
    ]
    assert results["acc,none"] == pytest.approx(sum(right) / len(right))
