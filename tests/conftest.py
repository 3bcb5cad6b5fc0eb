"""Fixtures of several test modules."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def temporary_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading must not write into the home directory of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
