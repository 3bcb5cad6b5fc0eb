"""Fixtures of several test modules."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, before any test asks


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Trainer collects garbage at every start; without this it looks through all of torch."""
    gc.freeze()


@pytest.fixture
def same_threads() -> Iterator[None]:
    """Whatever a test sets, later ones have torch's threads as before."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def temporary_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading must not write into the home directory of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def short_base_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base policy of the embedded default after 4 steps instead of 300."""
    monkeypatch.setattr("llm.data.embedded.BASE_STEPS", 4)


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a run on a saved tiny model and JSONL files of 40 rows each."""
    from _tiny import own_sources

    sources = own_sources(tmp_path)

    def command(*flags: str, evaluation_sets: bool = True) -> list[str]:
        names = sources if evaluation_sets else [n for n in sources if "eval" not in n]
        return [
            *("--output_dir", str(tmp_path / "out")),
            *("--max_steps", "6", "--use_cpu", "true", "--disable_tqdm", "true"),
            *("--report_to", "none", "--save_strategy", "no", "--learning_rate", "1e-2"),
            *(token for name in names for token in (f"--{name}", sources[name])),
            *flags,
        ]

    return command
