"""llm.benchmark.data: ours and TRL's preparation of the same generated rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.benchmark import data
from llm.benchmark.report import table
from theory.tasks import Task

pytestmark = [
    pytest.mark.usefixtures("temporary_datasets_cache"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("task", list(Task))
def test_both_prepare_all_rows_of_the_same_file(
    task: Task,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = data._generate(tmp_path / "rows.jsonl", task, 20)
    text = Path(source).read_text("utf-8")
    assert Path(data._generate(tmp_path / "again.jsonl", task, 20)).read_text("utf-8") == text
    assert all(json.loads(line).keys() == set(data.FIELDS[task]) for line in text.splitlines())
    tokenizer = data._train_tokenizer(tmp_path, source)
    for side in ("ours", "trl"):
        data.main(side, task.label, source, tokenizer, "1")
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["rows"] == 20
        assert record["seconds"] > 0.0 < record["peak_mib"]
        document = {
            "config": {"shape": {"name": "tiny"}, "threads": 1, "rounds": 1},
            "machine": {"device": "CPU"},
            "command": "",
            "clock": "",
            "rows": {"source": ""},
            "data": [record | {"task": task.label, "side": side}],
        } | {key: [] for key in ("comparisons", "costs", "throughput")}
        assert f"| {task.label} | {side} | 20 |" in table(document | {"failed": {}})
