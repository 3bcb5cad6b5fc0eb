"""Fixtures of several test modules."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Trainer collects garbage at every start; without this it looks through all of torch."""
    gc.freeze()


@pytest.fixture
def temporary_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading must not write into the home directory of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def short_base_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base policy of the embedded default after 4 steps instead of 300."""
    monkeypatch.setattr("llm.embedded.BASE_STEPS", 4)
