"""What every command of `llm` must do: refuse in one line, leave its files, do it again.

A line of REFUSED is the flags and what the refusal says. In them {own} is a model and data of one's
own that are there, {named} one that nothing opens, {sft} and {dpo} the same with one data set.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from _asserts import refusal
from _line import comparison, results
from _serve import pace
from _tiny import TOKENIZER, make_policy, own_sources, short_run

import llm.benchmark.__main__
import llm.compare.__main__
import llm.features.__main__
import llm.optima
import llm.report.__main__
import llm.run
import llm.validate.__main__
from llm import export, preview
from llm.report.command import command as command_of_run
from llm.report.record import read_run

pytestmark = pytest.mark.usefixtures("small", "same_threads")

MAINS: dict[str, Callable[[Any], None]] = {
    "run": llm.run.main,
    "compare": llm.compare.__main__.main,
    "validate": llm.validate.__main__.main,
    "optima": llm.optima.main,
    "features": llm.features.__main__.main,
    "benchmark": llm.benchmark.__main__.main,
    "report": llm.report.__main__.main,
    "preview": preview.main,
    "export": export.main,
}
OUTPUT = {
    "run": "--output_dir",
    "optima": "--output_dir",
    "preview": "",
    "report": "",
    "export": "",
}
"""Flag of the directory or file that a command writes; --out where nothing is said."""
CPU = {"run", "compare", "optima", "features", "preview"}
REFUSED = {
    "run": """
--lam 1.5                                   | lam is 1.5
--lam half                                  | --lam
--algo ppo                                  | ppo
--algo maxright --refresh_every 0           | refresh_every is 0
--algo maxright --value_ema 0               | value_ema is 0
--algo sequential --split 1.1               | --split is 1.1
--algo sequential --order both              | order is 'both'
--algo importance --dpo_probability 1       | dpo_probability
--algo alternate --cycle 0                  | cycle is 0
--conflict -0.5                             | --conflict is -0.5
--beta 0                                    | beta is 0
--label_smoothing 0.1 --loss_type ipo       | label_smoothing
--loss_type kto                             | loss_type is 'kto'
--per_device_train_batch_size 0             | batch size
--dpo_per_device_train_batch_size 0         | batch size of dpo
--max_train_rows 0                          | --max_train_rows is 0
--max_eval_rows -3                          | --max_eval_rows is -3
--dtype int8                                | int8
--truncation_mode middle                    | middle
--no_such_flag 1                            | --no_such_flag
--lambda 0.5                                | --lambda
--learn 0.5                                 | --learn
--config                                    | --config
--config {tmp}/missing.yaml                 | missing.yaml: No such file
--config={tmp}/missing.yaml                 | missing.yaml: No such file
--config {tmp}                              | --config {tmp}
--config {tmp}/binary.yaml                  | --config {tmp}/binary.yaml
--sft_dataset rows.jsonl                    | --sft_dataset: this needs a model of your own
--dtype bfloat16                            | --dtype: this needs a model of your own
--held-out 0.1                              | --held_out: this needs a model of your own
--label_smoothing_factor 0.1                | does not obey --label_smoothing_factor: drop it
--do_train false                            | does not obey --do_train (nothing here reads them)
--dataloader-drop-last true                 | does not obey --dataloader_drop_last (the loader is
--save_strategy best                        | --metric_for_best_model
--load_best_model_at_end true --save_strategy steps --save_steps 100 | --metric_for_best_model
{named} --conflict 0.5                      | --conflict belongs to the embedded corpus
{named} --held_out 0                        | --held_out is 0
{named} --held_out 1                        | --held_out is 1
{named} --sft_dataset missing.jsonl         | --sft_dataset missing.jsonl does not exist
{named} --dpo_eval_dataset missing.parquet  | --dpo_eval_dataset missing.parquet does not exist
{named} --sft_dataset some/rows --sft_eval_dataset some/rows | --sft_eval_dataset holds the
{sft} --beta 0.2                            | is not used without --dpo_dataset
{sft} --loss-type ipo                       | is not used without --dpo_dataset
{sft} --reference some/model                | is not used without --dpo_dataset
{sft} --dpo_max_length 5                    | is not used without --dpo_dataset
{dpo} --sft_per_device_train_batch_size 5   | is not used without --sft_dataset
--max_length 1                              | max_length is 1
--max_length 65                             | the model has only 64 positions
--reference no/such-model-anywhere          | cannot load no/such-model-anywhere
--algo maxright --optima none               | maxright compares gaps
--optima missing.json                       | --optima missing.json: No such file
--resume_from_checkpoint true               | no intact checkpoint in
--resume_from_checkpoint nowhere            | nowhere is not a directory
--output_dir {tmp}/broken.txt               | exists and is not a directory
{own} --model_name_or_path {tmp}            | cannot load
{own} --reference {tmp}                     | cannot load
{own} --reference {tmp}/other               | --reference {tmp}/other has another vocabulary
{own} --sft_dataset {tmp}/broken.jsonl      | sft train
{own} --dpo_eval_dataset {tmp}/broken.jsonl | dpo held-out
{own} --sft_dataset {tmp}/broken.txt        | unknown suffix '.txt'
""",
    "compare": """
--lam 0.5                               | --lam is set by the comparison
--output_dir x                          | --output_dir is set by the comparison: give --out
--save_steps 5                          | --save_steps is set by the comparison
--learning_rate 1 --learning_rates 1    | --learning_rate is not used with
--algos mix --refresh_every 3           | --refresh_every is not used by --algo mix
--optima none                           | --optima none: a comparison reports gaps
--lams 1.0                              | leaves one objective out
--algos ppo                             | unknown algorithm 'ppo'
--learning_rates 0                      | 0 is not a positive number
--sft_dataset x.jsonl                   | needs a model of your own
--out {tmp}/broken.txt                  | --out {tmp}/broken.txt exists and is not a directory
""",
    "validate": """
--comparison {tmp}/none                 | holds no finished comparison
--lams 0.5                              | --lams is not used without --run
--study_seeds 1                         | no intervals
--studies none clipping                 | cannot be combined
""",
    "optima": """
--algo maxright                         | --algo says nothing about the optima
--optima none                           | --optima says nothing
--refresh-every 5                       | --refresh_every says nothing
--resume_from_checkpoint true           | --resume_from_checkpoint says nothing
--stationarity 2                        | 2 is not a number in
--doublings 1                           | two doublings
--learning_rates 0                      | 0 is not a positive number
--gradient_rows -1                      | -1 is not a positive integer
--unheard_of 1                          | unheard_of
""",
    "features": """
{named} --learning_rate 1e-3            | --learning_rate
{named} --use_peft true                 | --use_peft
{named} --max_train_rows 3              | --max_train_rows
{named} --config run.yaml               | --config
{named} --candidates 2                  | --samples 2 need at least 4
{named} --samples -1                    | --samples
{named} --label_noise 0                 | --label_noise is 0.0; it must lie in (0, 0.5]
{named} --base_policy best              | mean, sum, uniform
{named} --beta nan                      | --beta
{named} --dim 0                         | --dim
{named} --out features.txt              | --out features.txt must end in .npz
""",
    "benchmark": """
--rounds 0                              | 0 is not a positive integer
--suites speed                          | invalid choice: 'speed'
--quick --shape small                   | --quick has a shape and a number of rounds of its own
--quick --rounds 2                      | --quick has a shape and a number of rounds of its own
--tokenizer x                           | --tokenizer is for
--sft_dataset x.jsonl                   | need --tokenizer
--full_finetuning                       | all weights of shape small are trained already
--time_limit -1                         | -1 is not a positive number
--peak_tflops fast                      | fast is not a positive number
""",
    "report": """
{tmp}/none                              | is not a directory
{tmp}                                   | neither a run of llm.run nor a comparison
{tmp}/foreign                           | neither a run of llm.run nor a comparison
{tmp}/unreadable                        | joint_config.json cannot be read
{tmp}/unreadable --out {tmp}            | is a directory; name a file
{tmp}/unreadable --validation v.json    | does not exist
""",
    "preview": """
--rows 0                                | 0 is not a positive integer
--lam 1.5                               | lam is 1.5
""",
    "export": """
{tmp}                                   | required: --out
{tmp} --out {tmp}/merged                | holds no adapter (adapter_config.json): nothing to merge
""",
}


class World(NamedTuple):
    """A place with good and bad files, and what the abbreviations in REFUSED stand for."""

    root: Path
    words: dict[str, str]

    def argv(self, flags: str) -> list[str]:
        return shlex.split(flags.format(**self.words))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    flags = [f"--{name} {source}" for name, source in own_sources(root, 24, 6).items()]
    words = {"tmp": str(root), "own": " ".join(flags), "train": " ".join(flags[:3])}
    make_policy(vocab_size=len(TOKENIZER) + 1).save_pretrained(root / "other")
    for name in ("broken.jsonl", "broken.txt"):
        (root / name).write_text('{"title": "why ?", "author": "so ."}\n')
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for name, content in (("foreign/summary.json", "{}"), ("unreadable/joint_config.json", "{")):
        (root / name).parent.mkdir()
        (root / name).write_text(content)
    model, data = "--model_name_or_path some/model", {}
    for task in ("sft", "dpo"):
        (root / f"named_{task}.jsonl").touch()
        data[task] = f" --{task}_dataset {root}/named_{task}.jsonl"
        words[task] = f"{model}{data[task]} --algo {task}"
    words["named"] = model + "".join(data.values())
    return World(root, words)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Short training of the base, no network, a cache of its own, no process that trains."""
    monkeypatch.setattr("llm.data.embedded.BASE_STEPS", 4)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf")
    monkeypatch.setattr("llm.benchmark.pool.serve", pace)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "line"),
    [(name, line) for name, lines in REFUSED.items() for line in lines.strip().splitlines()],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, line: str, world: World, tmp_path: Path
) -> None:
    flags, named = line.split(" | ")
    argv = ["--use_cpu", "true"] * (name in CPU)
    if name == "run" and "{" not in flags:
        argv += short_run(tmp_path / "out") + ["--optima", "none"] * ("--optima" not in flags)
    output = OUTPUT.get(name, "--out")
    argv += [output, str(tmp_path / "out")] if output else []
    assert named.format(**world.words) in refusal(MAINS[name], argv + world.argv(flags))
    left = [path for path in tmp_path.rglob("*.*") if path.suffix in (".safetensors", ".md")]
    assert not left
    assert not list(world.root.rglob("*.html"))
    assert (world.root / "broken.txt").read_text().startswith('{"title"')


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_cuda_device_is_said_before_anything_is_written(tmp_path: Path) -> None:
    flags = ["--device", "cuda", "--out", str(tmp_path / "out")]
    assert "no CUDA device" in refusal(MAINS["benchmark"], flags)
    assert not (tmp_path / "out").exists()


# --- what is left, and what the same command does then


class Left(NamedTuple):
    """A command line, its files, and the one that the same command line makes again."""

    flags: str
    files: str
    result: str
    never: str = ""
    """What would train: it may not be called when the command goes on where it stopped."""


PICTURE = "{0}.png {0}.svg {0}.json"
COMPARED = "config.json results.parquet paths.parquet results.csv tuning.csv summary.json table.md"
SHORT = (
    "--max_steps 4 --eval_steps 2 --logging_steps 2 --max_train_rows 32 --max_eval_rows 8 "
    "--disable_tqdm true"
)
LEFT = {
    "run": Left(
        f"--use_cpu true {SHORT} --optima none --output_dir {{out}}",
        "README.md config.json generation_config.json joint_config.json joint_summary.json "
        "kl_samples.json metrics.jsonl model.safetensors reference schedule.json "
        "tokenizer.json tokenizer_config.json training_args.bin",
        "schedule.json",
    ),
    "compare": Left(
        f"--use_cpu true {SHORT} --warmup_steps 0 --algos alright --lams 0.5 --seeds 1 --jobs 1 "
        "--learning_rates 1e-3 --budgets steps --out {out}",
        " ".join([COMPARED, "runs", *map(PICTURE.format, ("paths", "gaps", "compute"))]),
        "results.csv",
        never="llm.compare.workers.train",
    ),
    "validate": Left(
        "--comparison {compared} --studies none --out {out}",
        f"config.json validation.json table.md {PICTURE.format('validate')}",
        "validation.json",
    ),
    "optima": Left(
        f"--use_cpu true {SHORT} --doublings 2 --gradient_rows 4 --output_dir {{out}}",
        "kl_samples.json optima optima.json reference",
        "optima.json",
        never="llm.single_runs.make_trainer",
    ),
    "features": Left(
        "{train} --dim 3 --candidates 4 --samples 1 --rows 20 --use_cpu true --disable_tqdm true "
        "--out {out}/own.npz",
        "own.npz",
        "own.npz",
    ),
    "benchmark": Left(
        "--quick --suites overhead --out {out}",
        f"{PICTURE.format('benchmark')} table.md",
        "",
    ),
    "report": Left("{ran} --out {out}/page.html", "page.html", "page.html"),
    "preview": Left("--max_train_rows 2", "", ""),
}


def recorded(name: str, out: Path) -> list[str] | None:
    """The command line that the files of a command say it was."""
    if name == "run":
        text = command_of_run(read_run(out)).replace("\\\n", " ")
        text += f" --use_cpu true --output_dir {out}"  # the machine's own
    else:
        files = [out / "config.json", out / "benchmark.json"]
        text = next((json.loads(f.read_text())["command"] for f in files if f.exists()), "")
    words = shlex.split(text)
    assert not words or words[:3] == ["python", "-m", f"llm.{name}"]
    return words[3:] or None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A comparison and a run for the commands that read one."""
    root = tmp_path_factory.mktemp("finished")
    comparison(root / "compared", results())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.data.embedded.BASE_STEPS", 4)
        llm.run.main(short_run(root / "ran", "--optima", "none"))
    return {name: str(root / name) for name in ("compared", "ran")}


@pytest.mark.parametrize("name", LEFT)
def test_a_command_leaves_its_files_and_what_it_recorded_repeats_it(
    name: str,
    world: World,
    finished: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags, files, result, never = LEFT[name]
    out = tmp_path / "out"
    argv = shlex.split(flags.format(out=out, **world.words, **finished))
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()):
        MAINS[name](argv)
    left = {path.name for path in out.iterdir()} if out.exists() else set()
    assert left == set(files.split())
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    assert (str(out) in printed.getvalue().splitlines()[-1]) is bool(files)
    again = recorded(name, out) if files else argv
    if name in ("run", "compare", "validate", "benchmark"):
        assert again is not None
    if not result:
        return
    before = (out / result).read_bytes()
    (out / result).unlink()
    if never:
        monkeypatch.setattr(never, None)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        MAINS[name](again or argv)
    assert (out / result).read_bytes() == before
