"""The benchmark of the trainer: fair contenders, and numbers that are what they say."""

from __future__ import annotations

import io
import math
import statistics
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from _serve import pace, refuse
from _text import SHARED, needs_shared
from _tiny import PAD_ID, TOKENIZER, make_policy, train_rows
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from llm.benchmark import worker
from llm.benchmark.__main__ import main
from llm.benchmark.config import parse
from llm.benchmark.figures import benchmark_figure
from llm.benchmark.goodput import Work
from llm.benchmark.paper_way import PaperTrainer, all_logps
from llm.benchmark.plan import (
    COMPARISONS,
    CONTENDERS,
    EXPECTED_COST,
    MORE_ROUNDS,
    Comparison,
    Contender,
    Job,
    make_job,
)
from llm.benchmark.pool import Record, measure
from llm.benchmark.rows import LENGTHS, Sources, make_rows, tokens_of
from llm.benchmark.shapes import SHAPES
from llm.benchmark.summary import (
    expected_cost,
    paired_ratio,
    reuses_probe,
    seconds_per_unit,
    summarise_group,
    throughput,
)
from llm.loss.collate import collate_preference, collate_sft
from llm.loss.objectives import DPOObjective, SFTObjective
from theory.records import read_json
from theory.schedulers import Single
from theory.tasks import Task

TINY = SHAPES["tiny"]
ROWS = {task: make_rows(task, 4, TINY, Sources()) for task in Task}


def job_of(name: str, group: str = "joint", rounds: int = 1) -> Job:
    return make_job(Contender(*name.split("/")), group, TINY, "cpu", 1, rounds)


# ------------------------------------------------------------------------------ the whole command


class Result(NamedTuple):
    out: Path
    printed: str
    document: dict[str, Any]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("benchmark") / "new"
    with redirect_stdout(io.StringIO()) as printed:
        main(["--quick", "--suites", "overhead", "--out", str(out)])
    return Result(out, printed.getvalue(), read_json(out / "benchmark.json"))


def test_a_run_leaves_its_files_and_prints_its_table(quick: Result) -> None:
    names = {"benchmark.json", "benchmark.png", "benchmark.svg", "table.md"}
    assert {path.name for path in quick.out.iterdir()} == names
    assert (quick.out / "table.md").read_text() in quick.printed
    assert quick.document["command"].startswith("python -m llm.benchmark --quick --suites overhead")
    assert quick.document["rows"]["source"].startswith("generated")
    assert str(quick.out.parent) not in (quick.out / "benchmark.json").read_text()


def test_every_contender_has_its_rounds_and_its_memory(quick: Result) -> None:
    records = quick.document["groups"]["overhead"]
    assert tuple(records) == CONTENDERS["overhead"]
    assert quick.document["failed"] == {}
    for record in records.values():
        assert len(record["seconds"]) == MORE_ROUNDS["overhead", "ours"]  # times one
        assert min(record["seconds"]) > 0.0
        assert record["warm_up_seconds"] > 0.0
        # The memory of the worker itself, not of the process that started it.
        assert 50.0 < record["before_mib"] < record["peak_mib"]


def test_ratios_come_from_the_recorded_rounds(quick: Result) -> None:
    records = quick.document["groups"]["overhead"]
    (line,) = quick.document["comparisons"]
    over, under = (records[line[key]]["seconds"] for key in ("over", "under"))
    # Equal steps on both sides, so their number cancels; up to rounding in a logarithm.
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    assert line["median"] == pytest.approx(statistics.median(ratios), rel=1e-12)
    assert line["met"] is (line["median"] <= 1.15)
    assert f"{line['median']:.3f}" in quick.printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rounds", "0"],
        ["--suites", "speed"],
        ["--quick", "--shape", "small"],
        ["--quick", "--rounds", "2"],
        ["--tokenizer", "x"],
        ["--sft_dataset", "x.jsonl"],
        ["--full_finetuning"],
        ["--time_limit", "-1"],
        ["--peak_tflops", "fast"],
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_cuda_device_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        main(["--device", "cuda", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- the contenders


class Replies(list[Any]):
    """The worker's side of a connection: it is sent `messages`, and its answers are kept."""

    def __init__(self, *messages: Any) -> None:
        self.messages = iter(messages)

    def recv(self) -> Any:
        return next(self.messages)

    send = list.append


def answers_of(job: Job) -> list[dict[str, Any]]:
    """What a worker says when it is told to do all its rounds; in this process."""
    answers: Any = Replies((job, ROWS), *["go"] * (job.rounds + 1), "finish")
    with redirect_stdout(io.StringIO()):
        worker.serve(answers)
    return list(answers)


JOINT = sorted({name for suite in ("joint", "cost") for name in CONTENDERS[suite]})


@pytest.mark.usefixtures("same_threads")
@pytest.mark.parametrize("name", JOINT)
def test_a_joint_contender_takes_the_planned_steps(name: str) -> None:
    """Half of each objective in any round (MAXRIGHT(100): of all), and the planned probes."""
    job = job_of(name)
    ready, *rounds, last = answers_of(job)
    assert ready["before_mib"] > 0.0
    assert last["peak_mib"] > 0.0
    assert len(rounds) == job.rounds + 1
    period = Contender(*name.split("/")).refresh_every
    for number, counts in enumerate(rounds):
        assert counts["steps"] == job.steps
        steps = [counts["dpo_steps"], counts["sft_steps"]]
        first = number * job.steps
        probes = sum(t % period == 0 for t in range(first, first + job.steps)) if period else 0
        assert counts["probes"] == probes
        if name.endswith(("/sft", "/dpo")):
            assert steps == [job.steps * name.endswith("/dpo"), job.steps * name.endswith("/sft")]
        elif name.endswith("mix"):
            assert steps == [job.steps] * 2
        elif not name.endswith("sequential"):
            assert steps == [job.steps / 2] * 2
        if name.startswith("paper"):  # two evaluations, then the step's own forward pass
            assert counts["forwards"] == job.steps + 2 * probes
    if name.endswith("sequential"):
        first_stage = [counts["dpo_steps"] for counts in rounds]
        assert first_stage == sorted(first_stage, reverse=True)
        assert sum(first_stage) == job.total_steps // 2


@pytest.mark.usefixtures("same_threads")
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:trl")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [n for s in ("dpo", "sft") for n in CONTENDERS[s]])
def test_a_contender_on_one_objective_does_all_rounds(name: str) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    group = name.split("/")[1]
    job = job_of(name, group)
    answers = answers_of(job)
    assert [set(answer) >= {"seconds", "steps"} for answer in answers[1:-1]] == [True] * (
        job.rounds + 1
    )
    if name == "trl_packed/sft":
        notes = answers[0]["notes"]
        tokens = sum(map(tokens_of, ROWS[Task.SFT]))
        assert notes["sequences"] == answers[1]["steps"]
        assert notes["sequences"] * notes["packed_length"] >= tokens  # every row fits in a round
    if name == "ours/dpo":
        assert answers[0]["notes"]["cache_seconds"] > 0.0


@pytest.mark.usefixtures("same_threads")
def test_a_contender_that_fails_says_why() -> None:
    with pytest.raises(ValueError, match="sft: 4 rows in batches of 0"):
        answers_of(replace(job_of("ours/sft"), sft_batch=0))


def test_a_spent_time_limit_is_reported() -> None:
    said: list[str] = []
    (late,) = measure({"ours/sft": job_of("ours/sft")}, ROWS, said.append, deadline=0.0)
    assert late == {"ours/sft": {"failed": "not run: the time limit was reached"}}
    assert [line for line in said if "ours/sft: not run" in line]


def test_on_cuda_every_contender_leaves_its_record_before_the_next_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has the device for itself; those here fail before they use it."""
    monkeypatch.setattr("llm.benchmark.pool.serve", refuse)
    jobs = {name: replace(job_of(name), device="cuda") for name in ("ours/sft", "ours/dpo")}
    first, both = measure(jobs, ROWS, lambda _: None)
    assert (list(first), list(both)) == (["ours/sft"], ["ours/sft", "ours/dpo"])
    assert {record["failed"] for record in both.values()} == {"ValueError: not here"}


def test_rounds_are_taken_in_turn_and_whoever_has_fewer_stops_before_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm.benchmark.pool.serve", pace)
    jobs = {name: job_of(name) for name in ("ours/alright", "paper/alright")}
    assert [job.rounds for job in jobs.values()] == [2, 1]
    (records,) = measure(jobs, ROWS, lambda _: None)
    ours, paper = ([r["warm_up_seconds"], *r["seconds"]] for r in records.values())
    assert (len(ours), len(paper)) == (3, 2)
    assert ours[0] < paper[0] < ours[1] < paper[1] < ours[2]  # the moments of their answers
    assert all(record["peak_mib"] == 2.0 for record in records.values())


def test_on_cuda_every_choice_of_suites_has_a_place_of_its_own() -> None:
    """A call is limited in time: two of them may share a shape, not a file."""
    folder = Path("runs/gpu")
    cuda = ["--device", "cuda", "--shape", "pythia-1b"]
    assert parse(cuda).out == folder / "pythia-1b"
    assert parse([*cuda, "--suites", "dpo", "sft"]).out == folder / "pythia-1b-dpo-sft"


def test_on_cuda_trl_has_its_own_target_and_memory_none() -> None:
    """Peaks of models with frozen weights are those weights, whoever trains them."""
    targets = {
        (c.what, c.label): c.on("cuda").target for suite in COMPARISONS.values() for c in suite
    }
    assert targets["time", "DPO: TRL as it comes"] == targets["time", "SFT: TRL, packed"] == 2.0
    assert targets["memory", "DPO: TRL as it comes"] is None
    assert targets["time", "ALRIGHT: the paper's way"] is None
    assert targets["time", "MAXRIGHT(10) / ALRIGHT"] == 1.05
    assert all(c.on("cpu") == c for suite in COMPARISONS.values() for c in suite)


def test_the_papers_way_computes_the_same_losses(tmp_path: Path) -> None:
    """As the objectives of `llm`, with a live reference and all logits; float32 sums."""
    rows, reference = train_rows(), make_policy(seed=0)  # the reference of these rows
    policy = make_policy(seed=1)
    trainer = PaperTrainer(
        model=policy,
        reference=reference,
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1),
        scheduler=Single(Task.SFT),
        train_rows=rows,
        batch_sizes=dict.fromkeys(Task, 2),
        pad_token_id=PAD_ID,
        processing_class=TOKENIZER,
    )
    for task, objective, collate in (
        (Task.DPO, DPOObjective(), collate_preference),
        (Task.SFT, SFTObjective(), collate_sft),
    ):
        chosen = rows[task][:5]
        actual = trainer.loss_of(task, policy, collate(chosen, PAD_ID))
        terms = objective(policy, objective.collate(chosen, PAD_ID))
        expected = terms.total / objective.items(chosen)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert actual.requires_grad
    assert not any(weight.requires_grad for weight in reference.parameters())
    batch = collate_sft(rows[Task.SFT][:3], PAD_ID)
    assert all_logps(policy, batch).shape == (3, batch["labels"].shape[1] - 1)


# ------------------------------------------------------------------------------------- the rows


def test_generated_rows_are_reproducible_and_have_the_stated_lengths() -> None:
    shape = replace(TINY, vocab_size=1000, max_length=2048)
    for task in Task:
        rows = make_rows(task, 2000, shape, Sources())
        assert rows == make_rows(task, 2000, shape, Sources())
        for key in rows[0]:
            median, _ = LENGTHS[f"{task.label} {key}"]
            lengths = np.array([len(row[key]) for row in rows])
            # The median of n log-normals errs by 1.25 sigma / sqrt(n) (2.4%); 4 of these, and 1
            # token of rounding.
            assert np.median(lengths) == pytest.approx(median, rel=0.1, abs=1)
            assert max(max(row[key]) for row in rows) < 1000
    assert all(len(row["prompt_ids"]) <= 64 for row in make_rows(Task.DPO, 500, TINY, Sources()))


@needs_shared
@pytest.mark.usefixtures("temporary_datasets_cache")
def test_real_rows_keep_to_the_vocabulary_and_the_length_of_the_model() -> None:
    sources = Sources(
        dpo=str(SHARED / "data" / "preference_train.parquet"),
        tokenizer=str(SHARED / "tokenizer" / "gpt-neox-20b" / "tokenizer.json"),
    )
    rows = make_rows(Task.DPO, 20, SHAPES["small"], sources)
    assert len(rows) == 20
    for row in rows:
        assert 0 <= min(map(min, row.values())) <= max(map(max, row.values())) < 8192
        assert max(len(row["prompt_ids"]) + len(row[k]) for k in row if k != "prompt_ids") <= 512


# ---------------------------------------------------------------------------------- the numbers


def test_the_interval_of_a_ratio_is_students_on_the_logarithms() -> None:
    ratio = paired_ratio([2.0, 4.0, 8.0], [1.0, 1.0, 1.0])
    # Mean log 4, sample deviation log 2, t(0.975, 2) = 4.302653.
    half = 4.302653 * math.log(2.0) / math.sqrt(3.0)
    np.testing.assert_allclose(ratio, [4.0, 4.0 * math.exp(-half), 4.0 * math.exp(half)], rtol=1e-6)


def test_ratios_are_paired_round_by_round() -> None:
    """A disturbance that slows one round of both contenders leaves the ratio alone."""
    slow = np.array([1.0, 5.0, 1.0])
    np.testing.assert_allclose(paired_ratio(3.0 * slow, slow), 3.0, rtol=1e-12)


def test_one_round_has_no_interval() -> None:
    assert paired_ratio([3.0], [2.0]) == (1.5, 0.0, math.inf)


def test_a_ratio_takes_the_rounds_that_both_have() -> None:
    both = paired_ratio([4.0, 6.0], [2.0, 2.0])
    assert paired_ratio([4.0, 6.0], [2.0, 2.0, 5.0, 7.0]) == both


@pytest.mark.parametrize(
    ("sense", "target", "ratio", "met"),
    [
        ("at least", 3.0, 3.0, True),
        ("at least", 3.0, 2.9, False),
        ("at most", 1.15, 1.1, True),
        ("at most", 1.15, 1.2, False),
        ("within", 0.02, 0.99, True),
        ("within", 0.02, 1.03, False),
        ("at least", None, 9.0, None),
    ],
)
def test_a_target_is_met_in_its_own_sense(
    sense: str, target: float | None, ratio: float, met: bool | None
) -> None:
    assert Comparison("", "a", "b", target=target, sense=sense).met(ratio) is met


def test_every_comparison_is_between_contenders_of_its_suite() -> None:
    for suite, comparisons in COMPARISONS.items():
        for line in comparisons:
            for name in (line.over, line.under):
                assert name in CONTENDERS[suite] or name.startswith(EXPECTED_COST)


def counts(steps: int, dpo: int, probes: int = 0, reuse: bool = False) -> Record:
    forwards = steps + (1 if reuse else 2) * probes
    return {"steps": steps, "dpo_steps": dpo, "sft_steps": steps - dpo, "probes": probes} | {
        "forwards": forwards
    }


@pytest.mark.parametrize(
    ("algo", "recorded", "expected"),
    [
        ("mix", counts(10, 10), 3.0 + 12.0),
        ("alright", counts(10, 4), 0.6 * 3.0 + 0.4 * 12.0),
        ("sequential", counts(10, 10), 12.0),
        # A probe is a third of both steps: (3 + 12) / 3 = 5, every step or every tenth.
        ("maxright-1", counts(10, 5, 10), 7.5 + 5.0),
        ("maxright-10", counts(10, 5, 1), 7.5 + 0.5),
        # Reused, half of the probe's forward passes are those of the step: 2.5 less a probe.
        ("maxright-1", counts(10, 5, 10, reuse=True), 7.5 + 2.5),
        ("maxright-100", counts(40, 20, 0), 7.5 + 0.05),
    ],
)
def test_the_expected_cost_is_the_cost_model_at_measured_costs(
    algo: str, recorded: Record, expected: float
) -> None:
    actual = expected_cost(3.0, 12.0, recorded, 1.0 / 3.0)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_reuse_of_a_probe_shows_in_the_forward_passes() -> None:
    assert reuses_probe(counts(10, 5, 3, reuse=True))
    assert not reuses_probe(counts(10, 5, 3))
    assert not reuses_probe(counts(10, 5, 0))


@pytest.mark.parametrize("task", Task)
def test_the_operation_counts_are_those_of_the_matrix_products(task: Task) -> None:
    """Of a packed forward and backward, as torch counts them; attention is left out of both."""
    rows, objective = ROWS[task], DPOObjective() if task == Task.DPO else SFTObjective()
    torch.manual_seed(0)
    policy = make_policy(max_position_embeddings=TINY.max_length, vocab_size=TINY.vocab_size)
    batch_rows = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows]
    batch = objective.collate(batch_rows, PAD_ID)
    with FlopCounterMode(display=False) as counter:
        objective(policy, batch).total.backward()
    products = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in products.items() if str(op) in ("aten.mm", "aten.addmm"))
    no_attention = replace(Work.of(TINY), layers=0)
    assert counted == sum(map(no_attention.lean, rows))


def test_the_operation_counts_by_hand() -> None:
    """P = 2, C = 3, R = 4; N_b = 100, N_h = 10, L d = 6."""
    work = Work(backbone=100, head=10, layers=2, width=3)
    pair = {"prompt_ids": [1] * 2, "chosen_ids": [1] * 3, "rejected_ids": [1] * 4}
    demonstration = {"prompt_ids": [1] * 2, "completion_ids": [1] * 3}
    assert work.lean(demonstration) == 3 * (200 * 5 + 20 * 3 + 12 * 25)
    assert work.lean(pair) == 3 * (200 * 9 + 20 * 7 + 12 * (25 + 36 - 4))
    assert work.naive(pair) == 4 * (220 * 11 + 12 * (25 + 36))
    lora = replace(work, passes=2)
    assert lora.lean(pair) == pytest.approx(2 / 3 * work.lean(pair), rel=1e-15)
    # Of the prompt only its end predicts a response token, and the end of a response predicts none.
    trimmed = replace(work, last_mlp=7)
    assert work.lean(demonstration) - trimmed.lean(demonstration) == 3 * 14 * 2
    assert work.lean(pair) - trimmed.lean(pair) == 3 * 14 * 3


def test_weights_of_a_large_shape_are_counted_without_being_made() -> None:
    """Llama-3-8B: 8.03 billion parameters, of which the two embeddings have 0.525 each."""
    work = Work.of(SHAPES["llama-3-8b"])
    assert work.head == 128256 * 4096
    assert work.backbone == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert work.passes == 2


# ------------------------------------------------------------------------- summary and figure


def record_of(name: str, seconds: list[float]) -> Record:
    job = job_of(name, rounds=2)
    dpo = {"dpo": job.steps, "sft": 0, "mix": job.steps}.get(job.algo, job.steps // 2)
    period = Contender(*name.split("/")).refresh_every
    probes = job.steps // period if period else 0
    return {
        "steps_per_round": job.steps,
        "seconds": [job.steps * s for s in seconds],
        "rounds": [counts(job.steps, dpo, probes)] * len(seconds),
        "notes": {},
        "peak_mib": 200.0,
        "before_mib": 100.0,
    }


def test_a_summary_has_what_was_measured_and_leaves_out_what_failed() -> None:
    """S = 1, D = 3 and ALRIGHT at 2.2 a step: 10% above its objectives' mean."""
    records = {
        "ours/sft": record_of("ours/sft", [1.0, 1.0]),
        "ours/dpo": record_of("ours/dpo", [3.0, 3.0]),
        "ours/alright": record_of("ours/alright", [2.2, 2.2]),
        "paper/alright": record_of("paper/alright", [8.8, 8.8]),
        "ours/maxright-10": {"failed": "out of memory"},
    }
    summary = summarise_group("joint", ["joint", "cost"], records, TINY, "cpu")
    medians = {(line["what"], line["label"]): line["median"] for line in summary["comparisons"]}
    assert medians == {
        ("time", "ALRIGHT: the paper's way"): pytest.approx(4.0),
        ("memory", "ALRIGHT: the paper's way"): 1.0,
        ("time", "ALRIGHT / its objectives' costs"): pytest.approx(1.1),
    }
    (cost,) = summary["costs"]
    assert (cost["name"], cost["dpo_share"]) == ("ours/alright", 0.5)
    assert cost["ratio"]["median"] == pytest.approx(1.1)
    speeds = throughput("joint", records, ROWS, TINY, Work.of(TINY), tflops=1.0)
    assert [line["name"] for line in speeds] == list(records)[:-1]
    alright = speeds[2]
    assert alright["pairs_per_second"] == pytest.approx(TINY.joint.dpo / 2 / 2.2)
    drawn = {"comparisons": summary["comparisons"], "costs": summary["costs"]}
    figure = benchmark_figure(drawn | {"throughput": speeds})
    assert len(figure.axes) == 3
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert {"ALRIGHT / theory", "joint: paper/alright"} <= set(labels)


def test_a_suite_on_one_objective_counts_rows_and_the_others_steps() -> None:
    """TRL's packed rows come in another number of steps: only rows compare."""
    record = {"steps_per_round": 3, "seconds": [48.0]}
    rows = 4 * TINY.alone.number * TINY.alone.sft
    assert seconds_per_unit("trl_packed/sft", record, "sft", TINY) == [48.0 / rows]
    assert seconds_per_unit("ours/mix", record, "joint", TINY) == [16.0]
