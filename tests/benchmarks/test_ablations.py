"""What the A/B experiments count, draw up and report; their trainings are not run here."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.ablations import (
    context_router,
    delta_net,
    dynamic_experts,
    growth,
    incremental,
    long_context,
    offloading,
    recurrence,
    serving,
    smaller,
    two_domains,
)
from benchmarks.ablations.base import Finding, Report, Target, append_report
from benchmarks.ablations.training import HeldOut, Trained, small_run, train
from benchmarks.flops import count_flops
from configs.models import v31_nano
from infer.engine.types import Emitted, Request
from infer.query_router import Router
from infer.score import TokenScores
from model.model_state import init_state
from model.transformer import Transformer
from scripts import ablations
from tests import tiny
from tests.probes import drawn
from train.report import Picture
from train.step_cost import flops_per_step


def test_a_figure_is_judged_by_its_median():
    target = Target(limit=0.5, stretch=0.1, at_most=True)
    assert target.verdict(0.6) == "MISSED"
    assert target.verdict(0.5) == "reached"
    assert target.verdict(0.1) == "stretch reached"
    found = Finding(name="ratio", values=(0.9, 0.4, 0.45), target=target)
    assert found.row() == ["ratio", "0.45", "0.5833 ± 0.28", "3", "<= 0.5 (<= 0.1)", "reached"]
    assert Target(limit=4.3, stretch=30).verdict(29.0) == "reached"


def test_a_report_is_added_to_the_log_and_says_what_was_missed(tmp_path):
    findings = [
        Finding(name="speed", values=(2.0,), target=Target(limit=3.0)),
        Finding(name="loss", values=(0.1, 0.2)),
    ]
    report = Report(
        title="thing: against another",
        article="3 times",
        bound="4 times",
        setting="small",
        findings=findings,
        picture=Picture("thing", "", b""),
        notes=["A null."],
    )
    log = tmp_path / "ablations.md"
    log.write_text("# Claims\n")
    append_report(report, log, "python -m scripts.ablations thing", 90.0)
    text = log.read_text()
    assert text.startswith("# Claims\n\n## thing: against another (")
    assert "| speed | 2 | 2 ± 0 | 1 | >= 3 | MISSED |" in text
    assert text.endswith("- A null.\n")
    assert report.missed == ["speed"]


def test_operations_are_counted_by_hand_and_loops_by_their_trips():
    a, b = jnp.zeros((4, 8)), jnp.zeros((8, 16))
    assert count_flops(lambda a, b: a @ b, a, b) == 2 * 4 * 8 * 16

    def looped(x):
        return jax.lax.scan(lambda x, _: (x @ jnp.zeros((8, 8)), None), x, length=5)[0]

    assert count_flops(looped, a) == pytest.approx(5 * 2 * 4 * 8 * 8)
    assert count_flops(lambda a: a.sum(), a) == 4 * 8
    with pytest.raises(NotImplementedError, match="trip count"):
        count_flops(lambda a: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, a), a)


def test_the_planted_task_can_be_solved_with_the_flag_and_not_without():
    rows = context_router.planted_rows(np.random.RandomState(0), 512)
    asked = rows["targets"] >= 0
    assert asked.any()
    assert not asked[:, 0].any()
    flags = np.broadcast_to(rows["tokens"][:, :1], asked.shape)[asked]
    words, answers = rows["tokens"][asked], rows["targets"][asked]
    by_both, by_word = {}, {}
    for flag, word, answer in zip(flags, words, answers, strict=True):
        by_both.setdefault((flag, word), set()).add(answer)
        by_word.setdefault(word, []).append(answer)
    assert all(len(answers) == 1 for answers in by_both.values())
    best = sum(max(np.bincount(answers)) for answers in by_word.values())
    assert best / asked.sum() < 0.5


def test_a_passkey_row_asks_for_each_value_once_and_tells_it_before():
    row = long_context.passkey_row(np.random.RandomState(0), 512)
    asked = np.flatnonzero(row["targets"] >= 0)
    assert len(asked) == long_context.NEEDLES
    body = 512 - 2 * long_context.NEEDLES
    needles = row["tokens"][:body][row["tokens"][:body] >= long_context.BYTES] - long_context.BYTES
    told = dict(zip(*divmod(needles, long_context.VALUES), strict=True))
    assert len(told) == long_context.NEEDLES
    for place in asked:
        key = row["tokens"][place] - long_context.FIRST_KEY
        assert row["targets"][place] == long_context.FIRST_ANSWER + told[key]
    assert np.all(np.diff(row["positions"]) == 1)


def test_a_cache_grows_with_the_text():
    config = long_context.model(2048)
    small, large = (init_state(config, 1, slots, "float32") for slots in (64, 256))
    full = jax.tree.map(lambda x: x + 7, small)
    grown = long_context._enlarged(full, large)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), grown, large)
    for layer, spec in zip(grown.periods, config.pattern, strict=True):
        positions_RS = np.asarray(layer.attention.positions_RS)
        positions = positions_RS.reshape(-1, positions_RS.shape[-1])[0]
        slots = 36 if spec.attention.window_size else 64
        assert (positions[:slots] == 6).all()
        assert (positions[slots:] == -1).all()


def test_steps_until_in_range_wait_for_every_new_expert():
    def step(loads):
        return {"layer_0": {"expert_load": np.array([loads])}}

    steps = [step([1, 1, 1, 0])] * 12 + [step([1, 1, 1, 1])] * 30
    trained = Trained(None, None, np.zeros(42), steps, 0.0)  # type: ignore[arg-type]
    assert growth._steps_until_in_range(trained) == 12 + growth.SMOOTHED // 2
    target = Target(limit=200, at_most=True)
    never = Trained(None, None, np.zeros(12), steps[:12], 0.0)  # type: ignore[arg-type]
    assert growth._steps_until_in_range(never) == math.inf
    entered = Finding(name="steps", values=(math.inf, 3.0, math.inf), target=target)
    assert entered.row()[-1] == "MISSED"


def test_excess_load_leaves_out_what_drawing_gives():
    random = np.random.RandomState(0)
    drawn = np.stack([np.bincount(random.randint(64, size=20_000), minlength=64)])
    assert HeldOut(0.0, drawn, 10_000).excess_cv < 0.03
    counts = drawn + 300 * (np.arange(64) % 2)
    assert HeldOut(0.0, counts, int(counts.sum() / 2)).excess_cv == pytest.approx(0.32, abs=0.02)


def test_expert_share_is_most_of_the_work():
    assert 0.7 < dynamic_experts.expert_share() < 0.9


@pytest.mark.slow
def test_training_in_memory_learns():
    model = context_router.planted_model("context")
    config = small_run(model, steps=30, seed=0, seq_len=context_router.PLANTED_LENGTH)
    trained = train(config, context_router.planted_batches(config.batch_size, 0), "planted")
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert len(trained.router) == 30


@pytest.mark.slow
def test_recurrence_reaches_its_targets(monkeypatch):
    monkeypatch.setattr(recurrence, "ROUNDS", 2)
    assert recurrence.run(1).missed == []


def test_results_go_to_the_users_folder_unless_asked(tmp_path, monkeypatch):
    """Never into a file of the project by default."""
    finding = Finding(name="speed", values=(2.0,), target=Target(limit=3.0))
    texts = {"title": "thing", "article": "3 times", "bound": "4 times", "setting": "small"}
    report = Report(**texts, findings=[finding], picture=Picture("thing", "", b"png"))
    monkeypatch.setattr(ablations, "ABLATIONS", {"balance": lambda seeds: report})
    monkeypatch.chdir(tmp_path)
    kept = jax.config.jax_compilation_cache_dir
    ours = "runs/ablations/ablations.md"
    for arguments, log in (([], ours), (["--log", "mine/a.md"], "mine/a.md")):
        ablations.main(["balance", *arguments])
        jax.config.update("jax_compilation_cache_dir", kept)  # the session's, not the command's
        assert (tmp_path / log).read_text().startswith("\n## thing (")
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {ours, "runs/ablations/balance.png", "mine/a.md"}


def test_delta_net_compares_models_of_one_size():
    delta, windows = (make() for make in delta_net.MODELS.values())
    assert abs(delta.num_parameters / windows.num_parameters - 1) < 0.005
    assert delta.num_layers == windows.num_layers
    operations = [delta_net._kernel_flops(length) for length in (128, 256, 512)]
    assert np.diff(np.log2(operations)) == pytest.approx([1, 1], abs=0.02)
    line = delta_net._fit("cost", [float(n) ** 1.5 for n in delta_net.KERNEL_LENGTHS])
    assert line.values[0] == pytest.approx(1.5)
    assert "MISSED" in line.row()


def test_what_a_student_keeps_is_of_the_gain_over_unigrams():
    """By hand: unigrams 6, teacher 4; 4.1 keeps 1.9 of 2, 4.5 keeps 1.5."""
    plain = {"teacher": [4.0], "unigrams": [6.0], "student alone": [4.5]}
    more = {f"few bits {name}": [0.01 * i] for i, name in enumerate(smaller.JUDGED)}
    few = {f"student of few tokens {how}": [4.4] for how in ("alone", "with teacher")}
    found = smaller._findings(plain | few | {"student with teacher": [4.1]} | more)
    by_name = {finding.name: finding for finding in found}
    kept = by_name["student with teacher: share kept of the teacher's gain over unigrams"]
    assert kept.values == pytest.approx((0.95,))
    assert kept.row()[-1] == "reached"
    alone = by_name["student alone: share kept of the teacher's gain over unigrams"]
    assert alone.values == pytest.approx((0.75,))
    assert alone.row()[-1] == ""
    assert by_name["student with teacher less alone, nats"].values == pytest.approx((-0.4,))
    fewer = by_name["student of few tokens with teacher less alone, nats"]
    assert fewer.values == pytest.approx((0.0,))
    assert by_name["few bits by sensitivity less inverted, nats"].values == pytest.approx((-0.02,))


def test_the_student_is_a_thirteenth_of_the_teacher():
    teacher = v31_nano()
    assert teacher.num_parameters >= 13 * smaller.student().num_parameters
    assert teacher.vocab_size == smaller.student().vocab_size


def test_every_way_to_teach_further_has_a_tenth_of_joint_trainings_compute():
    joint = flops_per_step(incremental._run(incremental.model(), 1, 0)) * incremental.JOINT_STEPS
    for name, arm in incremental.ARMS.items():
        run, beside = incremental.arm_run(arm, joint, 0)
        spent = beside + run.steps * flops_per_step(run)
        assert 0.1 * joint - flops_per_step(run) < spent <= 0.1 * joint * (1 + 1e-9), name
        assert run.model.vocab_size == incremental.model().vocab_size


def test_the_claim_of_teaching_further_is_gain_and_forgetting_at_once():
    """The first seed gains too little, EWC forgets in the second, LoRA takes too much."""
    values = {"prose: nats": [3.0, 3.0]}
    for name in incremental.ARMS:
        values |= {f"{name}: gain": [0.9, 0.98], f"{name}: forgetting": [0.5, 0.5]}
        values |= {f"{name}: compute": [0.1, 0.1]}
    values["EWC: forgetting"] = [0.5, 1.5]
    values["LoRA: compute"] = [0.11, 0.11]
    found = {finding.name: finding for finding in incremental._findings(values)}
    (holds,) = (finding for name, finding in found.items() if name.startswith("ways that hold"))
    others = [name for name in incremental.ARMS if not name.startswith(incremental.PLAIN)]
    assert holds.values == (0.0, len(others) - 2)
    assert found["EWC: forgetting less plain's"].values == pytest.approx((0.0, 1.0))
    assert found["EWC: gain over joint's"].row()[-1] == "MISSED"  # the median: 0.94


def test_two_domains_share_no_text():
    module = '"""One."""\nclass A:\n    """Two."""\n\ndef f(x):  # three\n    return "four"'
    prose, code = two_domains.without_documentation(module)
    assert prose == "One.\n\nTwo."
    assert code == "class A:\n    pass\n\ndef f(x):\n    return 'four'"


def test_a_question_is_scored_by_its_answer_and_seen_without_it():
    length = offloading.QUESTION + offloading.ANSWER
    document = np.arange(length, dtype=np.int32)
    best = document[1:].copy()
    best[-4:] += 1  # four of the answer are wrong, one of the question
    best[5] = 0
    nats = np.linspace(0, 1, length - 1, dtype=np.float32)
    scored = TokenScores(nats, best)
    assert offloading.right(scored, document) == 1 - 4 / offloading.ANSWER
    features_F = offloading.seen(scored, document)
    other = document.copy()
    other[-offloading.ANSWER :] = 7
    answer = np.arange(length - 1) >= offloading.QUESTION - 1
    changed = TokenScores(np.where(answer, 9.0, nats), np.where(answer, 7, best))
    np.testing.assert_array_equal(offloading.seen(changed, other), features_F)
    assert features_F[4] == 1 - 1 / (offloading.QUESTION - 1)


def test_simple_questions_are_those_that_the_small_model_answers_as_well():
    """By hand: of four simple ones three stay, of two others one."""
    scores_N2 = np.array([(1, 1), (1, 1), (0.5, 0.5), (1, 0.5), (0, 1), (0, 1)], float)
    features_NF = np.zeros((6, 6))
    features_NF[:, 0] = [3, 3, 3, -3, 3, -3]
    weights = [1.0, 0, 0, 0, 0, 0]
    plain = {"small": "small", "bias": 0.0, "means": [0.0] * 6, "scales": [1.0] * 6}
    router = Router(weights=weights, threshold=0.5, target=0.95, report=None, **plain)  # type: ignore[arg-type]
    found = offloading.routed(router, offloading.Asked(features_NF, scores_N2))
    assert found.simple_share == 0.75
    assert found.routing.call_share == pytest.approx(2 / 6)
    assert found.routing.pgr == pytest.approx((4.0 - 3.5) / (5.0 - 3.5))
    names = {f.name: f.values for f in offloading.findings_of([found])}
    assert names["simple questions that stay with the small model"] == (0.75,)


@pytest.mark.slow
def test_offloading_at_a_tiny_size(monkeypatch):
    for name, value in (
        ("LARGE_STEPS", 12),
        ("SMALL_STEPS", 3),
        ("CALIBRATED", 64),
        ("JUDGED", 64),
    ):
        monkeypatch.setattr(offloading, name, value)
    report = offloading.run(1)
    assert len(report.findings) == 10
    assert all(np.isfinite(f.values).all() for f in report.findings)


def test_figures_of_serving_are_ratios_within_a_round():
    """By hand: twice the tokens in one round, thrice in the other; bytes a half and an eighth."""
    kinds = ("continuous", "static", "dynamic", "one at a time")
    values = {f"{kind}: tokens/s": [10.0, 20.0] for kind in kinds}
    values |= {f"{kind}: P99 between tokens, ms": [50.0, 70.0] for kind in kinds}
    values |= {f"{kind}: seconds": [6.0, 9.0] for kind in ("read", "from memory", "from disk")}
    for name in serving.FORMATS:
        values |= {f"{name}: tokens/s of {serving.ROWS} rows": [8.0, 8.0]}
        values |= {f"{name}: ms a token, alone": [40.0, 40.0]}
    values["continuous: tokens/s"] = [20.0, 60.0]
    values["from memory: seconds"] = [1.0, 1.0]
    values["int4: ms a token, alone"] = [10.0, 30.0]
    found = serving.findings_of(values, {"float32": 400.0, "int8": 200.0, "int4": 50.0})
    by_name = {finding.name: finding for finding in found}
    assert by_name["tokens/s, continuous over static batching"].values == (2.0, 3.0)
    assert by_name["seconds, read over asked again"].values == (6.0, 9.0)
    assert by_name["ms a token, alone: int4 over float32"].values == (0.25, 0.75)
    assert by_name["int4's bytes over float32's"].row()[-1] == "reached"
    assert by_name["int8's bytes over float32's"].row()[-1] == "MISSED"
    assert by_name["dynamic: P99 between tokens, ms"].row()[-1] == "reached"


class PlantedEngine:
    """Gives each request a token a step, in steps of a hundredth of a second."""

    def __init__(self):
        self.left = []

    def add(self, request):
        self.left.append(request.max_new_tokens)

    def has_work(self):
        return any(self.left)

    def step(self):
        time.sleep(0.01)
        going = [i for i, left in enumerate(self.left) if left]
        self.left = [max(left - 1, 0) for left in self.left]
        return [Emitted(i, [0], is_done=not self.left[i]) for i in going]


def test_a_load_is_timed_by_its_tokens_and_the_gaps_of_each_text():
    requests = [Request([0], 3), Request([0], 5)]
    turn = serving.answered(PlantedEngine(), requests)  # type: ignore[arg-type]
    assert len(turn.gaps) == 2 + 4
    assert turn.gaps.min() >= 0.01
    assert turn.tokens_per_second <= 8 / 0.05


class TinySource:
    def load(self, weights, for_decoding):
        config = tiny.model(context_length=256)
        return Transformer(config), drawn(config, seed=len(weights))


@pytest.mark.slow
def test_serving_at_a_tiny_size(monkeypatch):
    monkeypatch.setattr(serving, "open_source", lambda name: TinySource())
    sizes = {"REQUESTS": 3, "PROMPT": 12.0, "ANSWER": 8.0, "LONGEST": 64}
    sizes |= {"ROWS": 2, "REPEATED": 128, "AGAIN": 4, "ALONE": 6}
    for name, value in sizes.items():
        monkeypatch.setattr(serving, name, value)
    report = serving.run(1)
    assert all(np.isfinite(f.values).all() for f in report.findings)
    assert report.picture.png
