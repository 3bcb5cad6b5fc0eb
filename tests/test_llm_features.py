"""llm.features: candidate sets, pooled features, and the convex problem that they make."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _asserts import EXACT, assert_one_line_error
from _text import SHARED, needs_shared
from _tiny import PAD_ID, TOKENIZER, make_policy, own_sources, train_rows
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm.data.encode import encode_preference, encode_sft
from llm.data.sources import load_rows
from llm.features.__main__ import main
from llm.features.build import BuildOptions, build
from llm.features.candidates import LABELS, Extraction, Extractor
from llm.features.conflict import bootstrap, measure, vary
from llm.features.figures import conflict_figure
from llm.features.pooling import pool
from llm.loss.losses import dpo_loss
from theory.cli import UserError
from theory.feature_file import FeatureFile
from theory.objectives import response_log_probs
from theory.optima import ProblemOptima
from theory.problems import Problem, bernoulli_kl, make_problem, problem_from_features
from theory.tasks import Task
from theory.theorems.bounds import sequential_gap

# Float32 forward passes of a tiny model, in batches of other shapes.
FLOAT32 = 1e-5


def extractor(seed: int = 0, batch_size: int = 8) -> Extractor:
    eos = int(TOKENIZER.eos_token_id)
    return Extractor(make_policy(), eos, PAD_ID, batch_size=batch_size, seed=seed)


@lru_cache(maxsize=4)
def extractions(seed: int = 0, candidates: int = 5, samples: int = 1) -> dict[Task, Extraction]:
    return extractor(seed).extract(
        train_rows(), candidates=candidates, samples=samples, say=lambda _: None
    )


def sft_rows() -> list[Any]:
    names = ("prompt_ids", "completion_ids")
    return [{name: list(row[name]) for name in names} for row in train_rows()[Task.SFT]]


def built(**options: Any) -> FeatureFile:
    return build(extractions(), BuildOptions(**({"dim": 4} | options)), {})


def problem_of(data: FeatureFile) -> Problem:
    return problem_from_features(data, "features")


# --- candidate sets


@pytest.mark.parametrize("task", list(Task))
def test_a_candidate_set_has_its_labels_and_then_distinct_responses(task: Task) -> None:
    """At most as many as asked for: labels, one sample, and completions of SFT rows."""
    sets, rows = extractions()[task].sets, train_rows()[task]
    completions = {tuple(row["completion_ids"]) for row in train_rows()[Task.SFT]}
    for candidates, row in zip(sets, rows, strict=True):
        responses, labels = candidates.responses, [tuple(row[key]) for key in LABELS[task]]
        assert candidates.prompt == tuple(row["prompt_ids"])
        assert list(responses[: len(labels)]) == labels
        assert 2 <= len(set(responses)) == len(responses) <= 5
        assert set(responses[len(labels) + 1 :]) <= completions
        assert all(responses)


def test_samples_are_a_function_of_the_seed_and_come_from_the_model() -> None:
    def sampled(seed: int) -> list[tuple[int, ...]]:
        found = extractions.__wrapped__(seed, candidates=3)  # not from the cache
        return [candidates.responses[2] for candidates in found[Task.DPO].sets]

    assert sampled(0) == sampled(0) != sampled(1)


def test_the_nearest_prompt_is_the_same_question_elsewhere() -> None:
    """The last SFT row repeats the prompt of the first: each is the other's first neighbour."""
    rows = train_rows()
    twin = {**rows[Task.SFT][0], "completion_ids": rows[Task.SFT][0]["completion_ids"][:3]}
    rows[Task.SFT].append(twin)
    sets = extractor().extract(rows, candidates=2, samples=0, say=lambda _: None)[Task.SFT].sets
    assert sets[0].responses[1] == tuple(twin["completion_ids"])
    assert sets[-1].responses[1] == sets[0].responses[0]


def test_a_response_that_does_not_fit_behind_the_prompt_is_cut_at_the_positions() -> None:
    positions = 32
    rows = train_rows()
    rows[Task.SFT][0]["prompt_ids"] = list(rows[Task.SFT][0]["prompt_ids"]) * 3
    assert 20 < len(rows[Task.SFT][0]["prompt_ids"]) < positions
    rows[Task.SFT][0]["prompt_ids"] = rows[Task.SFT][0]["prompt_ids"][:24]
    sets = extractor().extract(rows, candidates=5, samples=1, say=lambda _: None)[Task.SFT].sets
    lengths = [len(sets[0].prompt) + len(response) for response in sets[0].responses]
    assert max(lengths) == positions


# --- pooling


def test_pooled_values_are_those_of_each_row_alone() -> None:
    """Mean of the last hidden state over the response, sum of its log-probabilities."""
    model = make_policy().eval()
    rows = sft_rows()
    pooled = pool(model, rows, batch_size=4, pad_token_id=PAD_ID, name="rows")
    for i, row in enumerate(rows):
        ids, start = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
        with torch.no_grad():
            hidden = model.gpt_neox(torch.tensor([ids])).last_hidden_state[0]
            logps = torch.log_softmax(model.lm_head(hidden), dim=-1)
        expected = hidden[start:].mean(dim=0).numpy()
        np.testing.assert_allclose(pooled.hidden[i], expected, rtol=0, atol=FLOAT32)
        logp = sum(float(logps[t - 1, ids[t]]) for t in range(start, len(ids)))
        assert pooled.logps[i] == pytest.approx(logp, abs=20 * FLOAT32)
        assert pooled.lengths[i] == len(row["completion_ids"])


def test_batches_hold_a_bounded_number_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 40 tokens: the same numbers in batches of one or two rows."""
    model, shapes = make_policy(), []
    rows = sft_rows()
    options: dict[str, Any] = {"batch_size": 8, "pad_token_id": PAD_ID, "name": "rows"}
    whole = pool(model, rows, **options)
    monkeypatch.setattr("llm.features.pooling.LOGITS_BYTES", 4 * len(TOKENIZER) * 40)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    parts = pool(model, rows, **options)
    assert all(shape.numel() <= 40 for shape in shapes)
    np.testing.assert_allclose(parts.hidden, whole.hidden, rtol=0, atol=FLOAT32)


def test_hidden_states_that_are_not_finite_are_the_users_business() -> None:
    model = make_policy()
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[:] = torch.nan
    rows: list[Any] = [{"prompt_ids": [3], "completion_ids": [4, 5]}]
    with pytest.raises(UserError, match="not all finite") as error:
        pool(model, rows, batch_size=1, pad_token_id=PAD_ID, name="rows")
    assert_one_line_error(str(error.value), "--dtype")


# --- features, base policy, labels


def existing(features: NDArray[np.float64], base: NDArray[np.float64]) -> Any:
    return [phi[row > -np.inf] for phi, row in zip(features, base, strict=True)]


def test_features_are_centred_normalised_and_padded_with_nothing() -> None:
    data = built()
    sets = {
        "dpo": existing(data.dpo_features, data.dpo_log_base),
        "sft": existing(data.sft_features, data.sft_log_base),
    }
    for phis in sets.values():
        for phi in phis:
            np.testing.assert_allclose(phi.mean(axis=0), 0.0, rtol=0, atol=1e-10)
    norms = [np.linalg.norm(phi, axis=1).max() for phis in sets.values() for phi in phis]
    assert max(norms) == pytest.approx(1.0, abs=EXACT)
    # Every direction has the same variance: prompts of a set and both sets weigh the same.
    moments = [np.mean([phi.T @ phi / len(phi) for phi in phis], axis=0) for phis in sets.values()]
    moment = np.mean(moments, axis=0)
    # Relative to the least eigenvalue kept, the projection is good to 1e-16 / 1e-9.
    np.testing.assert_allclose(moment / moment[0, 0], np.eye(4), rtol=0, atol=1e-6)
    assert np.all(data.sft_features[data.sft_log_base == -np.inf] == 0.0)


def test_fewer_dimensions_are_the_leading_ones() -> None:
    """Up to the common scale."""
    few, many = built(dim=2).sft_features, built(dim=4).sft_features[..., :2]
    scale = np.linalg.norm(many) / np.linalg.norm(few)
    np.testing.assert_allclose(few * scale, many, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["mean", "sum", "uniform"])
def test_the_base_policy_is_the_softmax_of_the_model_s_log_probabilities(kind: str) -> None:
    data, extraction = built(base_policy=kind, base_temperature=2.0), extractions()[Task.SFT]
    pooled, start = extraction.pooled, 0
    for row, size in zip(data.sft_log_base, extraction.sizes, strict=True):
        logps = pooled.logps[start : start + size]
        lengths = pooled.lengths[start : start + size]
        scores = {"mean": logps / lengths, "sum": logps, "uniform": 0.0 * logps}[kind] / 2.0
        expected = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(np.exp(row[:size]), expected, rtol=1e-10)
        assert np.all(row[size:] == -np.inf)
        start += size


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_labels_keep_what_the_data_say_with_probability_1_minus_noise(noise: float) -> None:
    data = built(label_noise=noise)
    np.testing.assert_array_equal(data.preference, 1.0 - noise)
    np.testing.assert_allclose(data.sft_labels[:, 0], 1.0 - noise, rtol=EXACT)
    exists = data.sft_log_base > -np.inf
    others = noise / (exists.sum(axis=1, keepdims=True) - 1)
    rest = np.where(exists, others, 0.0)[:, 1:]
    np.testing.assert_allclose(data.sft_labels[:, 1:], rest, rtol=EXACT)


def test_minimisers_are_interior_and_the_step_size_is_d_over_m() -> None:
    data = built()
    optima = ProblemOptima(problem_of(data))
    norms = [float(np.linalg.norm(optimum.theta)) for optimum in optima.single]
    assert all(optimum.interior for optimum in optima.single)
    assert data.radius == pytest.approx(2.0 * max(norms), rel=1e-6)
    constants = [f.constants(data.radius).gradient_norm for f in optima.problem.objectives]
    assert constants[Task.DPO] <= 2.0
    assert constants[Task.SFT] <= 2.0
    distance = float(np.linalg.norm(optima.mix(0.5).theta))
    assert data.step_scale == pytest.approx(distance / np.sqrt(np.mean(np.square(constants))))


# --- the bridge


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_autograd_finds_the_same_values_and_gradients(seed: int, beta: float) -> None:
    """f_SFT and f_DPO of pi_0 exp(theta . phi) / Z with torch, at a random theta of the ball."""
    data = built(beta=beta)
    problem = problem_of(data)
    rng = np.random.default_rng(seed)
    point = rng.standard_normal(data.dim)
    point *= data.radius * rng.random() / np.linalg.norm(point)
    theta = torch.from_numpy(point).requires_grad_()

    def log_policy(name: str, at: torch.Tensor) -> torch.Tensor:
        base = torch.from_numpy(getattr(data, f"{name}_log_base"))
        phi = torch.from_numpy(getattr(data, f"{name}_features"))
        return torch.log_softmax(base + phi @ at, dim=1)

    policy, reference = log_policy("dpo", theta), log_policy("dpo", torch.zeros_like(theta))
    sides = policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]
    kept = dpo_loss(*sides, beta=beta).losses
    flipped = dpo_loss(sides[1], sides[0], sides[3], sides[2], beta=beta).losses
    preference = torch.from_numpy(data.preference)
    f_dpo = (preference * kept + (1 - preference) * flipped).mean()
    labels = torch.from_numpy(data.sft_labels)
    terms = torch.where(labels > 0, labels * log_policy("sft", theta), 0.0)
    f_sft = -terms.sum(dim=1).mean()
    for loss, objective in zip((f_dpo, f_sft), problem.objectives, strict=True):
        (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
        assert loss.item() == pytest.approx(float(objective.value(point)), abs=1e-10)
        np.testing.assert_allclose(gradient.numpy(), objective.gradient(point), rtol=0, atol=1e-10)


def test_at_the_start_the_policy_is_the_base_and_dpo_log_2() -> None:
    problem, data = problem_of(built()), built()
    f_dpo, f_sft = problem.losses(problem.start)
    assert f_dpo == pytest.approx(np.log(2.0), abs=EXACT)
    exists = data.sft_labels > 0.0
    expected = -np.sum(data.sft_labels[exists] * data.sft_log_base[exists]) / len(data.sft_labels)
    assert f_sft == pytest.approx(expected, abs=EXACT)


# --- the conflict


def one_pair(p: float, q: float) -> FeatureFile:
    features, base = np.array([[[0.5], [-0.5]]]), np.zeros((1, 2))
    labels = np.array([[q, 1.0 - q]])
    return FeatureFile(features, base, np.array([p]), features, base, labels, 1.0, 10.0, 4.0)


def test_the_measures_of_one_pair_are_closed_forms() -> None:
    """One dimension: p and q on opposite sides of 1/2 pull in opposite directions."""
    measures = measure(one_pair(0.8, 0.3))
    assert measures["gradient_cosine"] == pytest.approx(-1.0)
    assert measures["minimiser_cosine"] == pytest.approx(-1.0)
    middle = 0.55
    start = bernoulli_kl(middle, 0.5)
    for order, end in (("dpo_then_sft", 0.3), ("sft_then_dpo", 0.8)):
        gap = bernoulli_kl(middle, end)
        assert measures[order]["gap"] == pytest.approx(gap, abs=1e-8)
        assert measures[order]["share"] == pytest.approx(gap / start, rel=1e-5)
        assert measures[order]["low"] <= gap <= measures[order]["high"]
    assert measure(one_pair(0.8, 0.7))["gradient_cosine"] == pytest.approx(1.0)


def test_the_bounds_of_t8_hold_on_the_features() -> None:
    data = built()
    optima, measures = ProblemOptima(problem_of(data)), measure(data)
    for order, last in (("dpo_then_sft", Task.SFT), ("sft_then_dpo", Task.DPO)):
        low, high = sequential_gap(optima, last, 0.5)
        assert 0.0 < low <= measures[order]["gap"] <= high


def test_resampled_prompts_scatter_around_the_measures() -> None:
    data = built(dim=2, label_noise=0.3)
    measures, intervals = measure(data), bootstrap(data, 12)
    assert intervals == bootstrap(data, 12)
    low, high = intervals["gradient_cosine"]
    assert low < measures["gradient_cosine"] < high
    assert set(intervals) == {"gradient_cosine", "minimiser_cosine", "dpo_then_sft", "sft_then_dpo"}


def test_vary_measures_every_value_that_the_extraction_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 hidden units span at most 16 dimensions: 1000 are left out."""
    varied = {"dim": (1, 3, 1000), "base_policy": ("uniform",), "beta": (0.5,)}
    monkeypatch.setattr("llm.features.conflict.VARIED", varied)
    settings = vary(extractions(), BuildOptions(dim=2), resamples=2)
    keys = [(record["option"], record["value"]) for record in settings]
    assert keys == [
        *(("dim", 1), ("dim", 2), ("dim", 3)),
        *(("base_policy", "uniform"), ("base_policy", "mean")),
        *(("beta", 0.5), ("beta", 1.0)),
    ]
    # beta scales theta_DPO* and nothing else of the direction at the start.
    cosines = [record["gradient_cosine"] for record in settings[-2:]]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-9)
    assert len(conflict_figure(settings).axes) == 6


# --- the command


@pytest.mark.usefixtures("temporary_datasets_cache")
def test_the_command_writes_a_problem_that_theory_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [f"--{name}={source}" for name, source in own_sources(tmp_path, 24, 1).items()][:3]
    small = ["--dim", "3", "--candidates", "4", "--samples", "1", "--rows", "20"]
    own = [*sources, *small, "--use_cpu", "true", "--disable_tqdm", "true"]
    main([*own, "--out", str(tmp_path / "own.npz")])
    problem = make_problem(str(tmp_path / "own.npz"))
    data = FeatureFile.load(tmp_path / "own.npz")
    assert problem.dim == 3
    assert len(data.preference) <= 20
    assert data.about["model"] == "model"
    assert data.about["options"]["dim"] == 3
    assert str(tmp_path) not in json.dumps(data.about)
    optima = ProblemOptima(problem)
    assert optima.mix(0.5).certificate <= 1e-8
    assert optima.max(0.5).certificate <= 1e-8
    out = capsys.readouterr().out
    assert "cosine" in out
    assert "own.npz" in out.splitlines()[-1]


def test_more_dimensions_than_the_candidates_span_are_refused() -> None:
    with pytest.raises(UserError, match="span only") as error:
        built(dim=40)
    assert_one_line_error(str(error.value), "--dim")


@needs_shared
def test_features_of_a_real_model_on_real_text_make_an_interior_problem() -> None:
    path = SHARED / "models" / "tinystories-656k"
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoders = {Task.DPO: ("preference", encode_preference), Task.SFT: ("sft", encode_sft)}
    rows: dict[Task, Any] = {}
    for task, (name, encode) in encoders.items():
        loaded = load_rows(str(SHARED / "data" / f"{name}_eval.parquet"), limit=24)
        rows[task] = encode(loaded, tokenizer, max_length=96, name=name).rows
    own = Extractor(model, tokenizer.eos_token_id, tokenizer.pad_token_id, batch_size=16, seed=0)
    real = own.extract(rows, candidates=4, samples=1, say=lambda _: None)
    data = build(real, BuildOptions(dim=4), {})
    policy = response_log_probs(data.sft_features, np.zeros(4))  # uniform, where pi_0 is not
    assert np.abs(np.exp(data.sft_log_base) - np.exp(policy)).max() > 0.01
    measures = measure(data)
    assert measures["dpo_then_sft"]["gap"] > 1e-4
    assert measures["sft_then_dpo"]["gap"] > 1e-4
