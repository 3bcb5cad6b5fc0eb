"""Sweeps: complete tables, runs that ignore their neighbours, and the same bits after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from _asserts import EXACT

from theory import sweep
from theory.metrics import convex_metrics, mean_interval
from theory.optima import ProblemOptima
from theory.optimizers import Adam, Momentum
from theory.problems import make_problem
from theory.simulate import ITERATES
from theory.sweep import COUNTS, KEYS, METRICS, Batch, Variant, discard_parts, run_sweep, summarise

ROW = ["variant", "lam", "seed", "step", "iterate"]
MIX = Batch("bernoulli", "mix", (0.2, 0.7), (3, 4), 30)
SPLITS = Batch(
    "quadratic",
    "sequential",
    (0.2, 0.7),
    (0, 1),
    40,
    variants=tuple(Variant(f"first {n}", {"first_steps": n}, {"split": n / 40}) for n in (10, 20)),
    options={"order": "sft_then_dpo"},
    record_steps=(5, 40),
)
CYCLES = Batch(
    "toy2d",
    "alternate",
    (0.25, 0.5),
    (1, 2),
    24,
    variants=tuple(Variant(f"cycle {n}", {"cycle": n}) for n in (4, 8)),
)
MAXRIGHT = Batch("toy2d", "maxright", (0.3, 0.6), (0, 5), 50, options={"refresh_every": 1})
BATCHES = [MIX, SPLITS, CYCLES, MAXRIGHT, Batch("toy2d", "alright", (0.3, 0.6), (0, 1), 40)]


def sweep_of(batches: list[Batch], **options: Any) -> pd.DataFrame:
    return run_sweep(batches, **{"jobs": 1, "progress": False} | options)


def rows(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for column, value in values.items():
        table = table[table[column] == value]
    return table.sort_values(ROW, ignore_index=True)


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that is really run, in this process."""
    done: list[Batch] = []
    original = sweep._run

    def counting(payload: bytes) -> tuple[Batch, pd.DataFrame]:
        batch, table = original(payload)
        done.append(batch)
        return batch, table

    monkeypatch.setattr(sweep, "_run", counting)
    return done


# --- one batch


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.algorithm)
def test_a_batch_has_one_row_per_variant_lam_seed_step_and_iterate(batch: Batch) -> None:
    table = batch.run()
    assert set(table) >= {*KEYS, "seed", *METRICS, *COUNTS}
    assert not table.duplicated(ROW).any()
    assert table.notna().all(axis=None)
    assert set(table["iterate"]) == set(ITERATES)
    counts = [table[column].nunique() for column in ROW]
    assert len(table) == np.prod(counts)
    assert set(table["lam"]) == set(batch.lams)
    assert set(table["seed"]) == set(batch.seeds)
    assert set(table["variant"]) == {variant.name for variant in batch.variants}
    if batch.record_steps is not None:
        assert tuple(sorted(set(table["step"]))) == batch.record_steps


def test_the_columns_of_a_variant_are_in_its_rows() -> None:
    table = SPLITS.run()
    assert np.all(table["split"] == table["variant"].map({"first 10": 0.25, "first 20": 0.5}))


def test_a_schedule_without_lam_runs_once_and_is_measured_at_every_lam() -> None:
    """Losses and counts do not depend on lam, f_Mix does."""
    table = SPLITS.run()
    low, high = rows(table, lam=0.2), rows(table, lam=0.7)
    for column in ("f_dpo", "f_sft", "ideal_distance", *COUNTS):
        np.testing.assert_array_equal(low[column], high[column])
    assert np.all(low["mix_gap"] != high["mix_gap"])


def test_the_counts_are_those_of_the_schedule() -> None:
    last = rows(CYCLES.run(), step=24)
    assert np.all(last["dpo_gradients"] == 24 * last["lam"])
    assert np.all(last["sft_gradients"] == 24 * (1 - last["lam"]))
    assert np.all(last["probes"] == 0)
    probing = replace(MAXRIGHT, values="exact").run()
    assert np.all(probing["probes"] == 2 * probing["step"])


def test_gaps_are_measured_from_the_certified_optima() -> None:
    optima = ProblemOptima(make_problem("quadratic"))
    table = SPLITS.run()
    for lam in SPLITS.lams:
        theirs = rows(table, lam=lam)
        low = optima.mix(lam).value
        f_mix = lam * theirs["f_dpo"] + (1 - lam) * theirs["f_sft"]
        np.testing.assert_allclose(theirs["mix_gap"], f_mix - low, rtol=0, atol=EXACT)
        assert np.all(theirs["mix_gap"] >= -1e-8)
        at_optimum = convex_metrics(optima, optima.mix(lam).theta, lam)
        assert abs(float(at_optimum["mix_gap"])) <= EXACT


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.algorithm)
def test_a_row_does_not_depend_on_the_rest_of_its_batch(batch: Batch) -> None:
    """Counts to the bit. The metrics go through BLAS, whose rounding depends on the batch."""
    table = batch.run()
    variant, lam, seed = batch.variants[-1], batch.lams[-1], batch.seeds[-1]
    alone = replace(batch, variants=(variant,), lams=(lam,), seeds=(seed,)).run()
    expected = rows(table, variant=variant.name, lam=lam, seed=seed)
    alone = rows(alone)
    for column in (*ROW, *COUNTS):
        np.testing.assert_array_equal(alone[column], expected[column])
    for column in METRICS:
        np.testing.assert_allclose(alone[column], expected[column], rtol=0, atol=EXACT)


def test_values_are_lazy_only_where_that_changes_nothing() -> None:
    exact = replace(MAXRIGHT, values="exact").run()
    lazy = MAXRIGHT.run()
    pd.testing.assert_frame_equal(lazy.drop(columns="probes"), exact.drop(columns="probes"))
    assert rows(lazy, step=50)["probes"].sum() < rows(exact, step=50)["probes"].sum()
    stale = replace(MAXRIGHT, options={"refresh_every": 5})
    pd.testing.assert_frame_equal(stale.run(), replace(stale, values="exact").run())


CHANGES: dict[str, Any] = {
    "problem": "toy2d",
    "algorithm": "alright",
    "lams": (0.2,),
    "seeds": (3, 5),
    "num_steps": 31,
    "variants": (Variant("named"),),
    "options": {"order": "dpo_then_sft"},
    "parameters": {"p": 0.8},
    "record_steps": (30,),
    "step_scale": 1.0,
    "decay": False,
    "batch_size": 2,
    "values": "fresh",
    "rule": Momentum(),
}


def test_the_key_of_a_batch_changes_with_every_field() -> None:
    assert set(CHANGES) == {field.name for field in fields(Batch)}
    changed = [replace(MIX, **{name: value}) for name, value in CHANGES.items()]
    others = [replace(MIX, rule=rule) for rule in (Momentum(0.5), Adam(), Adam(beta2=0.9))]
    keys = [batch.key for batch in (MIX, *changed, *others)]
    assert len(set(keys)) == len(keys)
    assert replace(MIX).key == MIX.key


# --- many batches


def test_a_sweep_is_its_batches_in_the_order_given() -> None:
    table = sweep_of(BATCHES)
    expected = pd.concat([batch.run() for batch in BATCHES], ignore_index=True)
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


def test_two_processes_give_the_table_of_one() -> None:
    pd.testing.assert_frame_equal(sweep_of(BATCHES), sweep_of(BATCHES, jobs=2), check_exact=True)


def test_a_dask_cluster_gives_the_table_of_one_process() -> None:
    distributed = pytest.importorskip("distributed")
    expected = sweep_of(BATCHES)
    with warnings.catch_warnings():
        # Dask closes its event loop and sockets on its own time: no concern of ours.
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        cluster = distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        )
        with cluster, distributed.Client(cluster):
            table = sweep_of(BATCHES, jobs=2, backend="dask")
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


# --- resuming


def test_finished_batches_are_not_run_again(tmp_path: Path, finished: list[Batch]) -> None:
    expected = sweep_of(BATCHES)
    finished.clear()
    sweep_of(BATCHES[:2], parts=tmp_path)
    assert finished == BATCHES[:2]
    assert {path.stem for path in tmp_path.iterdir()} == {batch.key for batch in BATCHES[:2]}
    resumed = sweep_of(BATCHES, parts=tmp_path)
    assert finished == BATCHES
    pd.testing.assert_frame_equal(resumed, expected, check_exact=True)
    sweep_of(BATCHES, parts=tmp_path)
    assert finished == BATCHES  # nothing was left to do


def test_parts_of_another_batch_are_not_taken(tmp_path: Path, finished: list[Batch]) -> None:
    sweep_of([MIX], parts=tmp_path)
    sweep_of([replace(MIX, num_steps=31)], parts=tmp_path)
    assert [batch.num_steps for batch in finished] == [30, 31]


def test_discarded_parts_are_gone(tmp_path: Path) -> None:
    sweep_of([MIX], parts=tmp_path / "parts")
    discard_parts(tmp_path / "parts")
    discard_parts(tmp_path / "parts")  # nothing there: no error
    assert not (tmp_path / "parts").exists()


SLOW = [Batch("toy2d", "maxright", (0.5,), (seed,), 1500) for seed in range(12)]
KILLED = f"""
import sys
from pathlib import Path
from theory.sweep import Batch, Variant, run_sweep
run_sweep({SLOW}, jobs=1, parts=Path(sys.argv[1]), progress=False)
"""


def test_a_killed_sweep_ends_with_the_same_bits(tmp_path: Path, finished: list[Batch]) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    while process.poll() is None and not list(tmp_path.glob("[!.]*.parquet")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path.stem for path in tmp_path.glob("[!.]*.parquet")}
    assert 0 < len(kept) < len(SLOW)
    resumed = sweep_of(SLOW, parts=tmp_path)
    assert [batch.key for batch in finished] == [b.key for b in SLOW if b.key not in kept]
    pd.testing.assert_frame_equal(resumed, sweep_of(SLOW), check_exact=True)


# --- summaries


def test_a_summary_is_the_interval_over_seeds_group_by_group() -> None:
    many = [replace(batch, seeds=tuple(range(5))) for batch in (MIX, SPLITS)]
    table = sweep_of(many)
    summary = summarise(table)
    assert not summary.duplicated(list(KEYS)).any()
    assert len(summary) == len(table) / 5
    groups = dict(iter(table.groupby(list(KEYS))))
    for row in summary.to_dict(orient="records"):
        group = groups[tuple(row[str(key)] for key in KEYS)]
        assert row["seeds"] == len(group) == 5
        for metric in METRICS:
            expected = mean_interval(group[metric])
            np.testing.assert_allclose(row[metric], expected, rtol=1e-9, atol=EXACT)
        for count in COUNTS:
            assert row[count] == group[count].mean()


def test_one_seed_has_an_infinite_interval() -> None:
    summary = summarise(replace(MIX, seeds=(3,)).run())
    for interval in summary["mix_gap"]:
        assert interval.low == -np.inf
        assert interval.high == np.inf
