"""results.json beside a skeleton of what lm-evaluation-harness 0.4.13 writes."""

import json

import pytest

from configs.checks import UserError
from evals.records import sample_hash
from evals.results import read_results, with_earlier, write_results
from evals.results_form import sha256
from evals.run import evaluate
from infer.run_weights import RunWeights
from tests.evals import tiny_results
from tests.evals.planted import Planted, evaluation

TOP = {
    "results": dict,
    "groups": dict,
    "group_subtasks": dict,
    "configs": dict,
    "versions": dict,
    "n-shot": dict,
    "higher_is_better": dict,
    "n-samples": dict,
    "config": dict,
    "git_hash": (str, type(None)),
    "date": float,
    "pretty_env_info": str,
    "transformers_version": str,
    "lm_eval_version": str,
    "upper_git_hash": (str, type(None)),
    "tokenizer_pad_token": list,
    "tokenizer_eos_token": list,
    "tokenizer_bos_token": list,
    "eot_token_id": (int, type(None)),
    "max_length": (int, type(None)),
    "model_source": str,
    "model_name": str,
    "model_name_sanitized": str,
    "system_instruction": (str, type(None)),
    "system_instruction_sha": (str, type(None)),
    "fewshot_as_multiturn": (bool, type(None)),
    "chat_template": (str, type(None)),
    "chat_template_sha": (str, type(None)),
    "task_hashes": dict,
    "total_evaluation_time_seconds": str,
}
"""Names and types of EvalResults in its result_schema.py, "samples" aside: a file of its own."""
CONFIG = {
    *("model", "model_args", "model_num_parameters", "model_dtype", "model_revision", "model_sha"),
    *("batch_size", "batch_sizes", "device", "use_cache", "limit", "bootstrap_iters"),
    *("gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed"),
}
TASK_CONFIG = {"task", "output_type", "num_fewshot", "metric_list", "repeats", "metadata"}
SAMPLE = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash"),
}
ADDED = {"baselines", "weights", "identity"}


def test_every_name_is_there_with_its_type():
    tree = json.loads(json.dumps(tiny_results.tree()))
    assert set(tree) == set(TOP) | ADDED
    for name, kind in TOP.items():
        assert isinstance(tree[name], kind), name
    assert set(tree["config"]) >= CONFIG
    assert set(tree["configs"]["numbers"]) >= TASK_CONFIG


def test_scores_have_its_names():
    tree = tiny_results.tree()
    assert tree["results"]["numbers"] == {
        "name": "numbers",
        "alias": "numbers",
        "sample_len": 4,
        "acc,none": 0.5,
        "acc_stderr,none": pytest.approx((1 / 3) ** 0.5 / 2),
        "acc_norm,none": 0.5,
        "acc_norm_stderr,none": pytest.approx((1 / 3) ** 0.5 / 2),
    }
    assert tree["results"]["numbers_low"]["alias"] == " - low"
    assert tree["group_subtasks"] == {"numbers": ["numbers_low", "numbers_high"]}
    assert tree["groups"] == {"numbers": tree["results"]["numbers"]}
    for name in ("numbers", "numbers_low", "numbers_high"):
        assert tree["versions"][name] == 2
        assert tree["n-shot"][name] == 0
        assert tree["higher_is_better"][name] == {"acc": True, "acc_norm": True}
    assert tree["n-samples"]["numbers"] == {"original": 4, "effective": 4}
    assert tree["n-samples"]["numbers_low"] == {"original": 2, "effective": 2}


def test_samples_have_its_form(tmp_path):
    likes_one = Planted(lambda context, choice: -1.5 if choice == " one" else -2.0)
    (found,) = evaluate(evaluation(likes_one, tmp_path), [tiny_results.TASK])
    lines = [json.loads(line) for line in (tmp_path / "samples_numbers.jsonl").open()]
    assert all(set(line) >= SAMPLE for line in lines)
    line, sample = lines[1], tiny_results.SAMPLES[1]
    assert line["doc_id"] == 1
    assert line["target"] == "1"
    assert line["arguments"]["gen_args_1"] == {"arg_0": "Question 1:", "arg_1": " two"}
    assert line["resps"] == [[["-1.5", "False"]], [["-2.0", "False"]]]
    assert line["filtered_resps"] == [["-1.5", "False"], ["-2.0", "False"]]
    assert line["log_likelihoods"] == [-1.5, -2.0]
    assert {name: line[name] for name in line["metrics"]} == {"acc": 0.0, "acc_norm": 0.0}
    assert line["prompt_hash"] == sha256("Question 1:")
    assert line["sample_hash"] == sample_hash(sample)
    tree = json.loads((tmp_path / "results.json").read_text())
    hashes = "".join(x["doc_hash"] + x["prompt_hash"] + x["target_hash"] for x in lines)
    assert tree["task_hashes"] == {"numbers": sha256(hashes)}
    assert found.task_hash == sha256(hashes)


def test_tasks_of_the_same_model_are_kept_and_of_others_refused(tmp_path):
    path = tmp_path / "results.json"
    first, second = tiny_results.tree(), tiny_results.tree()
    for section in ("results", "configs", "versions", "n-samples"):
        second[section] = {
            name.replace("numbers", "letters"): x for name, x in second[section].items()
        }
    second["group_subtasks"] = {"letters": []}
    write_results(path, with_earlier(first, path))
    write_results(path, with_earlier(second, path))
    assert [r.task for r in read_results(path)] == ["numbers", "letters"]
    other = tiny_results.tree(RunWeights(step=4, sha256="cd" * 32))
    with pytest.raises(UserError, match=r"results of another model \(its weights differ\)"):
        with_earlier(other, path)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"results.json is no result of ours"):
        with_earlier(first, path)


def test_what_is_no_number_is_null(tmp_path):
    tree = tiny_results.tree()
    tree["results"]["numbers"]["acc,none"] = float("nan")
    write_results(tmp_path / "results.json", tree)
    (result,) = read_results(tmp_path / "results.json")
    assert result.value != result.value
    assert result.weights == tiny_results.WEIGHTS
