"""Benchmarks in their official form from a folder: what is asked, and what is said of others."""

import json

import pytest

from configs.checks import UserError
from evals.samples import Choices, Load
from evals.tasks import official_folders

FAMILIES = {family.name: family for family in official_folders.TASKS}


def load(name: str, num_fewshot: int = 0, **settings) -> list[Choices]:
    task = FAMILIES[name.partition(":")[0]].make(name.partition(":")[2])
    assert task.name == name
    return [s for s in task.load(Load(num_fewshot, **settings)) if isinstance(s, Choices)]


@pytest.fixture
def mmlu(tmp_path):
    for split, count in (("dev", 5), ("test", 8)):
        (tmp_path / split).mkdir()
        for subject in ("high_school_law", "cooking"):
            rows = [
                f'"{subject}, {split} {i}?",a{i},b{i},"c, {i}",d{i},{"ABCD"[i % 4]}\n'
                for i in range(count)
            ]
            (tmp_path / split / f"{subject}_{split}.csv").write_text("".join(rows))
    return tmp_path


def test_mmlu_in_its_own_words(mmlu):
    samples = load(f"mmlu:{mmlu}", 2)
    assert len(samples) == 16
    assert len({s.key for s in samples}) == 16
    sample = next(s for s in samples if s.key == "high_school_law_test/3")
    assert sample.context == (
        "The following are multiple choice questions (with answers) about high school law.\n\n"
        "high_school_law, dev 0?\nA. a0\nB. b0\nC. c, 0\nD. d0\nAnswer: A\n\n"
        "high_school_law, dev 1?\nA. a1\nB. b1\nC. c, 1\nD. d1\nAnswer: B\n\n"
        "high_school_law, test 2?\nA. a2\nB. b2\nC. c, 2\nD. d2\nAnswer:"
    )
    assert (sample.choices, sample.answer) == ((" A", " B", " C", " D"), 2)
    assert {s.group for s in samples} == {"high_school_law", "cooking"}
    assert load(f"mmlu:{mmlu}", 2, seed=1) != samples


def test_mmlu_of_another_form_is_named(mmlu, tmp_path):
    with pytest.raises(UserError, match="--num-fewshot 6 is more than the 5 examples"):
        load(f"mmlu:{mmlu}", 6)
    path = mmlu / "test" / "cooking_test.csv"
    path.write_text(path.read_text() + "question,a,b,A\n")
    with pytest.raises(UserError, match=r"cooking_test.csv, line 9, has 4 columns"):
        load(f"mmlu:{mmlu}", 0)
    with pytest.raises(UserError, match=r"has no test/SUBJECT_test.csv"):
        load(f"mmlu:{mmlu / 'dev'}")
    (mmlu / "dev" / "high_school_law_dev.csv").unlink()
    path.unlink()
    with pytest.raises(UserError, match=r"high_school_law_dev\.csv is not there"):
        load(f"mmlu:{mmlu}", 1)


ROWS = {
    "CoLA": ["gj04\t0\t*\tHe quickly.", "gj04\t1\t\tHe runs."],
    "SST-2": ["sentence\tlabel", 'a "fine film \t1', "dull .\t0"],
    "MRPC": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t1\t2\tA b.\tB a."],
    "QQP": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t1\t2\tWho?\tWhat?\t0"],
    "MNLI": ["index\tsentence1\tsentence2\tgold_label", "0\tIt rains.\tIt is wet.\tentailment"],
    "QNLI": ["index\tquestion\tsentence\tlabel", "0\tWho?\tAnn did.\tnot_entailment"],
    "RTE": ["index\tsentence1\tsentence2\tlabel", "0\tIt rains.\tIt snows.\tnot_entailment"],
    "WNLI": ["index\tsentence1\tsentence2\tlabel", "0\tAnn saw Bea.\tBea was seen.\t1"],
}
ANSWERS = {
    "CoLA": " no",
    "SST-2": " positive",
    "MRPC": " yes",
    "QQP": " no",
    "MNLI": " True",
    "QNLI": " no",
    "RTE": " False",
    "WNLI": " True",
}


@pytest.mark.parametrize("name", ROWS)
def test_each_task_of_glue(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    file = "dev_matched.tsv" if name == "MNLI" else "dev.tsv"
    (folder / file).write_text("\n".join(ROWS[name]) + "\n", encoding="utf-8")
    (folder / "train.tsv").write_text("\n".join(ROWS[name]) + "\n", encoding="utf-8")
    samples = load(f"glue:{folder}")
    assert samples[0].choices[samples[0].answer] == ANSWERS[name]
    assert "{" not in samples[0].context
    if name == "SST-2":
        assert samples[0].context == (
            'a "fine film\nQuestion: Is this sentence positive or negative?\nAnswer:'
        )
        assert [s.answer for s in samples] == [1, 0]
    shown = load(f"glue:{folder}", 1)
    assert shown[0].context.endswith("\n\n" + samples[0].context)


def test_glue_of_another_form_is_named(tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    with pytest.raises(UserError, match=r"dev.tsv is not there"):
        load(f"glue:{folder}")
    (folder / "dev.tsv").write_text("text\tlabel\ngood\t1\n")
    with pytest.raises(UserError, match="has no column sentence: its columns are text, label"):
        load(f"glue:{folder}")
    (folder / "dev.tsv").write_text("sentence\tlabel\ngood\n")
    with pytest.raises(UserError, match="line 2, has 1 columns, and 2 were needed"):
        load(f"glue:{folder}")
    (folder / "dev.tsv").write_text("sentence\tlabel\ngood\t5\n")
    with pytest.raises(UserError, match="line 2: label '5' is none of 0, 1"):
        load(f"glue:{folder}")
    with pytest.raises(
        UserError, match=r"'SST2' is no task of GLUE: name a folder called CoLA, SST-2"
    ):
        load(f"glue:{tmp_path / 'SST2'}")


def test_arc_in_both_of_its_forms(tmp_path):
    theirs = {
        "id": "q1",
        "question": {
            "stem": "Which is hot?",
            "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}],
        },
        "answerKey": "2",
    }
    columns = {
        "id": "q2",
        "question": "Which is cold?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    path = tmp_path / "arc.jsonl"
    path.write_text(json.dumps(theirs) + "\n\n" + json.dumps(columns) + "\n")
    first, second = load(f"arc:{path}")
    assert first == Choices("1/q1", "Question: Which is hot?\nAnswer:", (" ice", " fire"), 1)
    assert second == Choices("3/q2", "Question: Which is cold?\nAnswer:", (" ice", " fire"), 0)
    path.write_text(json.dumps({"question": "?", "answerKey": "A"}))
    with pytest.raises(UserError, match=r"arc.jsonl, line 1, has another form: question, choices"):
        load(f"arc:{path}")
    path.write_text('{"question": ')
    with pytest.raises(UserError, match=r"arc.jsonl, line 1, is no JSON"):
        load(f"arc:{path}")


def test_hellaswag_without_its_marks(tmp_path):
    row = {
        "ind": 24,
        "activity_label": "Baking",
        "ctx_a": "A man kneads dough. [step]",
        "ctx_b": "then he",
        "endings": ["sleeps [title] away.", "bakes it."],
        "label": "1",
    }
    path = tmp_path / "hellaswag.jsonl"
    path.write_text(json.dumps(row))
    (sample,) = load(f"hellaswag:{path}")
    assert sample.context == "Baking: A man kneads dough. Then he"
    assert sample.choices == (" sleeps. away.", " bakes it.")
    assert (sample.key, sample.answer) == ("1/24", 1)
    with pytest.raises(UserError, match="asked without examples"):
        load(f"hellaswag:{path}", 3)
    for label in (7, "", None, -1):
        path.write_text(json.dumps({**row, "label": label}))
        with pytest.raises(UserError, match=f"line 1: label {label!r} is no ending"):
            load(f"hellaswag:{path}")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_path_is_needed(name):
    with pytest.raises(UserError, match=f"{name} needs a path: {name}:"):
        FAMILIES[name].make("")


def test_tasks_of_glue_have_its_own_metrics():
    def names(folder: str) -> list[str]:
        return [metric.name for metric in FAMILIES["glue"].make(f"data/{folder}").metrics]

    assert (names("CoLA"), names("MRPC"), names("QQP")) == (
        ["mcc", "acc"],
        ["acc", "f1"],
        ["acc", "f1"],
    )
    assert names("SST-2") == ["acc"]
    with pytest.raises(UserError, match="'STS-B' is no task of GLUE"):
        names("STS-B")


def test_files_that_are_no_text_or_no_table_are_named(mmlu, tmp_path):
    path = mmlu / "test" / "cooking_test.csv"
    for letter in ("", "AB", "E"):
        path.write_text(f"question,a,b,c,d,{letter}\n")
        with pytest.raises(UserError, match=r"cooking_test.csv, line 1, .* a letter from A to D"):
            load(f"mmlu:{mmlu}")
    for content, sentence in ((b"caf\xe9,a,b,c,d,A\n", "no UTF-8 text"), (b"x" * 140000, "no csv")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"cooking_test.csv is {sentence}"):
            load(f"mmlu:{mmlu}")
    for name, file in (("glue", "SST-2/dev.tsv"), ("arc", "arc.jsonl"), ("hellaswag", "h.jsonl")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
        asked = tmp_path / "SST-2" if name == "glue" else tmp_path / file
        with pytest.raises(UserError, match=r"is no (UTF-8 text|JSON)"):
            load(f"{name}:{asked}")
