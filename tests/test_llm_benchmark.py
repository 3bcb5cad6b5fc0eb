"""The benchmark of the trainer: fair contenders, and numbers that are what they say."""

from __future__ import annotations

import io
import json
import math
import statistics
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _serve import pace, refuse
from _text import SHARED, needs_shared
from _tiny import PAD_ID, TOKENIZER, make_policy, train_rows
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
from theory.schedulers import Single
from theory.tasks import Task

TINY = SHAPES["tiny"]
ROWS = {task: make_rows(task, 4, TINY, Sources()) for task in Task}


def job_of(name: str, group: str = "joint", rounds: int = 1) -> Job:
    return make_job(Contender(*name.split("/")), group, TINY, "cpu", 1, rounds)


# ------------------------------------------------------------------------------ the whole command


def test_what_the_command_records_are_the_rounds_of_real_processes(tmp_path: Path) -> None:
    with redirect_stdout(io.StringIO()) as printed:
        main(["--quick", "--suites", "overhead", "--out", str(tmp_path / "new")])
    text = (tmp_path / "new" / "benchmark.json").read_text()
    assert str(tmp_path) not in text
    document = json.loads(text)
    assert (tmp_path / "new" / "table.md").read_text() in printed.getvalue()
    assert document["rows"]["source"].startswith("generated")
    records = document["groups"]["overhead"]
    assert tuple(records) == CONTENDERS["overhead"]
    assert document["failed"] == {}
    for record in records.values():
        assert len(record["seconds"]) == MORE_ROUNDS["overhead", "ours"]  # times one
        assert min(*record["seconds"], record["warm_up_seconds"]) > 0.0
        # The memory of the worker itself, not of the process that started it.
        assert 50.0 < record["before_mib"] < record["peak_mib"]
    (line,) = document["comparisons"]
    over, under = (records[line[key]]["seconds"] for key in ("over", "under"))
    # Equal steps on both sides, so their number cancels; up to rounding in a logarithm.
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    assert line["median"] == pytest.approx(statistics.median(ratios), rel=1e-12)
    assert line["met"] is (line["median"] <= 1.15)
    assert f"{line['median']:.3f}" in printed.getvalue()


# ------------------------------------------------------------------------------- the contenders


def answers_of(job: Job) -> list[dict[str, Any]]:
    """What a worker says when it is told to do all its rounds; in this process."""
    ours, theirs = Pipe()
    for message in ((job, ROWS), *["go"] * (job.rounds + 1), "finish"):
        ours.send(message)
    with redirect_stdout(io.StringIO()):
        worker.serve(theirs)
    return [ours.recv() for _ in range(job.rounds + 3)]


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
    assert all(set(answer) >= {"seconds", "steps"} for answer in answers[1:-1])
    if name == "trl_packed/sft":
        notes = answers[0]["notes"]
        tokens = sum(map(tokens_of, ROWS[Task.SFT]))
        assert notes["sequences"] == answers[1]["steps"]
        assert notes["sequences"] * notes["packed_length"] >= tokens  # every row fits in a round
    if name == "ours/dpo":
        assert answers[0]["notes"]["cache_seconds"] > 0.0


def test_on_cuda_every_contender_leaves_its_record_before_the_next_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has the device for itself; those here fail before they use it."""
    monkeypatch.setattr("llm.benchmark.pool.serve", refuse)
    jobs = {name: replace(job_of(name), device="cuda") for name in ("ours/sft", "ours/dpo")}
    first, both = measure(jobs, ROWS, lambda _: None)
    assert (list(first), list(both)) == (["ours/sft"], ["ours/sft", "ours/dpo"])
    assert {record["failed"] for record in both.values()} == {"ValueError: not here"}
    said: list[str] = []
    *_, late = measure(jobs, ROWS, said.append, deadline=0.0)
    assert late["ours/dpo"] == {"failed": "not run: the time limit was reached"}
    assert len(said) == len(late) == 2


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


def test_on_cuda_trl_has_its_own_target_memory_none_and_every_choice_a_place() -> None:
    """Peaks of models with frozen weights are those weights, whoever trains them."""
    targets = {
        (c.what, c.label): c.on("cuda").target for suite in COMPARISONS.values() for c in suite
    }
    assert targets["time", "DPO: TRL as it comes"] == targets["time", "SFT: TRL, packed"] == 2.0
    assert targets["memory", "DPO: TRL as it comes"] is None
    assert targets["time", "ALRIGHT: the paper's way"] is None
    assert targets["time", "MAXRIGHT(10) / ALRIGHT"] == 1.05
    assert all(c.on("cpu") == c for suite in COMPARISONS.values() for c in suite)
    # A call is limited in time: two choices of suites may share a shape, not a file.
    cuda = ["--device", "cuda", "--shape", "pythia-1b"]
    assert parse(cuda).out == Path("runs/gpu/pythia-1b")
    assert parse([*cuda, "--suites", "dpo", "sft"]).out.name == "pythia-1b-dpo-sft"


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


def test_a_ratio_is_paired_and_its_interval_students_on_the_logarithms() -> None:
    ratio = paired_ratio([2.0, 4.0, 8.0], [1.0, 1.0, 1.0])
    # Mean log 4, sample deviation log 2, t(0.975, 2) = 4.302653.
    half = 4.302653 * math.log(2.0) / math.sqrt(3.0)
    np.testing.assert_allclose(ratio, [4.0, 4.0 * math.exp(-half), 4.0 * math.exp(half)], rtol=1e-6)
    slow = np.array([1.0, 5.0, 1.0])  # slows one round of both: the ratio does not see it
    np.testing.assert_allclose(paired_ratio(3.0 * slow, slow), 3.0, rtol=1e-12)
    assert paired_ratio([3.0], [2.0]) == (1.5, 0.0, math.inf)  # one round has no interval
    both = paired_ratio([4.0, 6.0], [2.0, 2.0])
    assert paired_ratio([4.0, 6.0], [2.0, 2.0, 5.0, 7.0]) == both  # the rounds that both have


def test_a_target_is_met_in_its_own_sense() -> None:
    for sense, target, met, missed in (
        ("at least", 3.0, 3.0, 2.9),
        ("at most", 1.15, 1.1, 1.2),
        ("within", 0.02, 0.99, 1.03),
    ):
        comparison = Comparison("", "a", "b", target=target, sense=sense)
        assert (comparison.met(met), comparison.met(missed)) == (True, False)
    assert Comparison("", "a", "b").met(9.0) is None


def test_every_comparison_is_between_contenders_of_its_suite() -> None:
    for suite, comparisons in COMPARISONS.items():
        names = {name for line in comparisons for name in (line.over, line.under)}
        strange = names - set(CONTENDERS[suite])
        assert all(name.startswith(EXPECTED_COST) for name in strange)


def counts(steps: int, dpo: int, probes: int = 0, reuse: bool = False) -> Record:
    forwards = steps + (1 if reuse else 2) * probes
    return {"steps": steps, "dpo_steps": dpo, "sft_steps": steps - dpo, "probes": probes} | {
        "forwards": forwards
    }


@pytest.mark.parametrize(
    ("algo", "recorded", "expected"),
    [
        ("mix", counts(10, 10) | {"sft_steps": 10}, 3.0 + 12.0),
        ("alright", counts(10, 4), 0.6 * 3.0 + 0.4 * 12.0),
        ("sequential", counts(10, 10), 12.0),
        # A probe is a third of both steps: (3 + 12) / 3 = 5, every step or every tenth.
        ("maxright-1", counts(10, 5, 10), 7.5 + 5.0),
        ("maxright-10", counts(10, 5, 1), 7.5 + 0.5),
        # Reused, half of the probe's forward passes are those of the step: 2.5 less a probe.
        ("maxright-1", counts(10, 5, 10, reuse=True), 7.5 + 2.5),
        ("maxright-100", counts(40, 20, 0), 7.5),
    ],
)
def test_the_expected_cost_is_the_cost_model_at_measured_costs(
    algo: str, recorded: Record, expected: float
) -> None:
    actual = expected_cost(3.0, 12.0, recorded, 1.0 / 3.0)
    assert actual == pytest.approx(expected, rel=1e-12)
    reused = recorded["forwards"] < recorded["steps"] + 2 * recorded["probes"]
    assert reuses_probe(recorded) is reused


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
