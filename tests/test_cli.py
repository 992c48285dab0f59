"""The command line: what a newcomer reads, the whole way through, and one line for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_pipeline import NUM_ITEMS, a_log, an_items_table

from gflowgr import cli
from gflowgr.trie import PrefixTrie

COMMANDS = (
    "prepare",
    "tokenize",
    "train",
    "evaluate",
    "recommend",
    "trie",
    "table",
    "compare",
    "doctor",
    "demo",
)
QUICK = (
    "split.max_history=6",
    "model={layers: 1, d_model: 16, heads: 2}",
    "training.objective=sft",
    "training.max_steps=2",
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.per_device_train_batch_size=8",
    "training.disable_tqdm=true",
    "training.use_cpu=true",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything up to a trained run was done by the command."""
    path = tmp_path_factory.mktemp("cli")
    a_log().to_csv(path / "log.csv", index=False)
    an_items_table().to_csv(path / "items.csv", index=False)
    data, run = str(path / "data"), str(path / "run")
    prepare = ["--rating", "stars", "--items", f"{path}/items.csv", "--text", "title", "kind", "--core", "3"]
    assert cli.main(["prepare", f"{path}/log.csv", "--output", data, *prepare]) == 0
    assert cli.main(["tokenize", data, "--levels", "2", "--codebook-size", "4"]) == 0
    (path / "config.yaml").write_text("training: {learning_rate: 1e-3, max_steps: 99}\n")
    train = ["train", "--data", data, "--config", f"{path}/config.yaml", "--output", run, *QUICK]
    assert cli.main(train) == 0
    return path


def output_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(argv) == 0
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command says when it refuses, which has to be one line and no traceback."""
    capsys.readouterr()
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr().err
    assert code == 2
    lines = [line for line in said.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("gflowgr: error: ")
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: gflowgr {command}" in text


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in (*COMMANDS, "bench"))


def test_help_and_doctor_do_without_the_train_extra() -> None:
    heavy = ["transformers", "pandas", "sklearn", "faiss", "implicit", "yaml", "rich", "matplotlib", "peft"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy}))\n"
        "from gflowgr import cli\n"
        "assert cli.main(['doctor']) == 0\n"
        "cli.main(['train', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "example: gflowgr train" in done.stdout


def test_a_missing_extra_is_named(folder: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pandas']))\n"
        f"from gflowgr import cli; sys.exit(cli.main(['prepare', {str(folder / 'log.csv')!r}, '--output', "
        "'x']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "gflowgr: error:" in done.stderr
    assert "pip install 'gflowgr[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_overrides_win_over_the_config(folder: Path) -> None:
    text = (folder / "run" / "config.yaml").read_text()
    assert "max_steps: 2\n" in text
    assert "learning_rate: 0.001\n" in text


def test_evaluate_prints_what_it_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, path = str(folder / "run"), folder / "metrics.json"
    printed = output_of(capsys, "evaluate", run, "--part", "validation", "--output", str(path))
    metrics = json.loads(path.read_text())["metrics"]
    for name, metric in metrics.items():
        line = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert f"{metric['value']:.4f}" in line
    assert re.search(r"40 users, 24 items, [0-9,]+ users a second", printed)


def test_a_run_compared_with_itself_does_not_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = str(folder / "run"), folder / "compare.html"
    printed = output_of(capsys, "compare", run, run, "--output", str(page))
    metrics = json.loads((folder / "run" / "metrics.json").read_text())["test"]["metrics"]
    for name, shown in (("recall@5", "R@5"), ("recall@10", "R@10"), ("ndcg@5", "N@5"), ("ndcg@10", "N@10")):
        value = f"{metrics[name]['value']:.4f}".replace("0.", ".", 1)
        assert re.search(rf"^{shown} +{value} +{value} +\+\.0000  \+\.0000 to \+\.0000$", printed, re.M)
    assert "40 users, 24 items" in printed
    assert "No sure difference" in page.read_text(encoding="utf-8")


def test_evaluate_takes_training_settings_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "run")
    longer = output_of(
        capsys, "evaluate", run, "training.eval_num_items=3", "--part", "test", "training.eval_num_beams=8"
    )
    assert "recall@3" in longer
    assert "recall@10" not in longer
    assert "model" in error_of(capsys, "evaluate", run, "model.layers=2")


def test_a_run_that_learned_from_no_other_has_no_teacher(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(folder / "run")
    assert "unrecognized arguments: --teach x=1" in error_of(capsys, "doctor", "--teach", "x=1")
    for command in (("evaluate", run), ("recommend", run, "10")):
        assert "a teacher to rank beside its model" in error_of(capsys, *command, "--teacher-weight", "0.5")


def test_a_ranking_with_the_teacher_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "beside")
    train = ["train", "--data", str(folder / "data"), "--output", run, "--recipe", "sft", *QUICK]
    beside = ["collaborative.model=popularity", "ranking.teacher_weight=0.5"]
    trained = output_of(capsys, *train, *beside)
    hint = "ranked with the run's teacher at weight 0.5; "
    assert trained.endswith(f"{hint}gflowgr evaluate {run} --teacher-weight 0 leaves it out\n")
    output = str(folder / "beside.json")
    measured = output_of(capsys, "evaluate", run, "--output", output)
    assert measured.endswith(f"{hint}--teacher-weight 0 leaves it out\n")
    said = [
        json.loads(Path(output).read_text()),
        json.loads(output_of(capsys, "recommend", run, "10", "--json")),
    ]
    assert [document["teacher_weight"] for document in said] == [0.5, 0.5]
    assert "geometric mean of both probabilities" in output_of(capsys, "recommend", run, "10")
    assert "with the run's teacher" not in output_of(capsys, "evaluate", run, "--teacher-weight", "0")
    assert "probabilities" not in output_of(capsys, "recommend", run, "10", "--teacher-weight", "0")


def test_recommend_prints_titles(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "run")
    text = output_of(capsys, "recommend", run, "the river no. 4", "10", "--count", "3")
    assert text.startswith("after The river no. 4, The mountain no. 5:")
    titles = set(an_items_table()["title"])
    assert sum(any(title in line for title in titles) for line in text.splitlines()[2:]) == 3
    answer = json.loads(output_of(capsys, "recommend", run, "10", "--count", "3", "--json"))
    assert [row["title"] in titles for row in answer["recommended"]] == [True] * 3
    assert answer["history"] == ["The mountain no. 5"]
    left_out = answer["recommended"][0]["item_id"]
    rest = json.loads(output_of(capsys, "recommend", run, "10", "--json", "--exclude", left_out))
    assert left_out not in [row["item_id"] for row in rest["recommended"]]
    repeated = json.loads(
        output_of(
            capsys, "recommend", run, "10", "--count", str(NUM_ITEMS), "--beams", "24", "--repeat", "--json"
        )
    )
    assert "10" in [row["item_id"] for row in repeated["recommended"]]


def test_trie_inspect_walks_a_prefix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(folder / "data" / "trie.safetensors")
    trie = PrefixTrie.load(path)
    shape = output_of(capsys, "trie", "inspect", path)
    assert f"{NUM_ITEMS} items, {trie.num_nodes} nodes" in shape
    first = int(trie.children(0)[0])
    under = output_of(capsys, "trie", "inspect", path, "--prefix", str(first))
    assert f"{int(trie.item_count[1])} items under [{first}]" in under
    off = error_of(capsys, "trie", "inspect", path, "--prefix", str(first), str(first))
    assert f"token {first} does not follow [{first}]" in off


def test_trie_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "codes.npy", np.array([[0, 1], [0, 2], [3, 0]]))
    built = output_of(capsys, "trie", "build", f"{tmp_path}/codes.npy", f"{tmp_path}/trie.safetensors")
    assert "3 items, 6 nodes" in built
    assert "exists" in error_of(
        capsys, "trie", "build", f"{tmp_path}/codes.npy", f"{tmp_path}/trie.safetensors"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("prepare {0}/none.csv --output {0}/new", "none.csv"),
        ("prepare {0}/log.csv --output {0}/new --user usr_id", "'user_id'"),
        ("prepare {0}/log.csv --output {0}/data", "exists already"),
        ("prepare {0}/log.csv --output {0}/new --core 0", "at least 1"),
        ("prepare {0}/log.csv --output {0}/new --behaviour stars --behaviour-value 3", "NAME=NUMBER"),
        ("prepare {0}/log.csv", "--output"),
        ("tokenize {0}", "no data folder"),
        ("tokenize {0}/data", "already"),
        ("tokenize {0}/data --codebook-size 100 --overwrite", "power of two"),
        ("tokenize {0}/data --codes {0}/log.csv --overwrite", "log.csv"),
        ("tokenize {0}/data --levels two", "--levels"),
        ("train --output {0}/new", "no data folder"),
        ("train --data {0}/data --output {0}/run", "exists already"),
        ("train --data {0}/data --output {0}/new training.learning_rat=1", "'learning_rate'"),
        ("train --data {0}/data --output {0}/new training", "key=value"),
        ("train --data {0}/data --output {0}/new --config {0}/none.yaml", "none.yaml"),
        ("train --data {0}/data --output {0}/new --config {0}/log.csv", "log.csv"),
        ("train --data {0}/data --output {0}/new --resume", "no run to resume"),
        ("train --data {0}/data --output {0}/data --overwrite", "no config.yaml"),
        ("train --data {0}/data --output {0}/new model.layers=abc", "layers is 'abc', needs an integer"),
        ("train --data {0}/data --output {0}/new model.layers=0", "layers is 0, needs at least 1"),
        ("train --data {0}/data --output {0}/new model.heads=0", "heads is 0, needs at least 1"),
        (
            "train --data {0}/data --output {0}/new training.rollout_share=abc",
            "rollout_share is 'abc', needs a",
        ),
        (
            "train --data {0}/data --output {0}/new training.rollout_beyond=1.5",
            "rollout_beyond is 1.5, needs an",
        ),
        (
            "train --data {0}/data --output {0}/new training.learning_rate=fast",
            "learning_rate is 'fast', needs a",
        ),
        (
            "train --data {0}/data --output {0}/new training.eval_num_items=50",
            "eval_num_beams is 20, needs at",
        ),
        ("train --data {0}/data --output {0}/new training.metric_for_best_model=ndcg", "eval_ndcg@10"),
        (
            "train --data {0}/data --output {0}/new reward.terms.interaction.mapping=5",
            "mapping is 5, needs keys",
        ),
        ("train --data {0}/data --output {0}/new reward.weights=0.5", "weights is 0.5, needs keys"),
        ("train --data {0}/data --output {0}/new model.kind=[a]", "model.kind is ['a'], needs one of"),
        (
            "train --data {0}/data --output {0}/new collaborative.model=[a]",
            "collaborative.model is ['a'], needs",
        ),
        ("train --data {0}/data --output {0}/new collaborative.path={0}/none", "none is not a file"),
        ("train --data {0}/data --output {0}/new model.kind=checkpoint", "needs folder"),
        (
            "evaluate {0}/run training.exclude_history=maybe",
            "exclude_history is 'maybe', needs true or false",
        ),
        ("prepare {0}/log.csv --output {0}/new --behaviour-value like=10", "needs --behaviour"),
        ("evaluate {0}/data", "no run's folder"),
        ("recommend {0}/run mountain", "fits 6 titles"),
        ("recommend {0}/run 10 --count 0", "num_items"),
        ("trie inspect {0}/log.csv", "not a saved PrefixTrie"),
        ("trie build {0}/log.csv {0}/new", "log.csv"),
        ("trian", "trian"),
        ("", "COMMAND"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: str, message: str
) -> None:
    before = {path for path in folder.rglob("*")}
    assert message in error_of(capsys, *argv.format(folder).split())
    assert {path for path in folder.rglob("*")} == before


def test_a_traceback_can_be_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFLOWGR_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="no data folder"):
        cli.main(["tokenize", str(folder)])


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gflowgr", "tokenize", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("gflowgr: error: ")
