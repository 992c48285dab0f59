from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowgr.data import (
    Examples,
    Histories,
    InteractionLog,
    LikeLengths,
    Split,
    collate,
    k_core,
    read_log,
    split,
)


def make_log(histories: list[list[int]], num_items: int | None = None) -> InteractionLog:
    """Users with the given items, one second apart, the value of an interaction being its row."""
    user = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    item = np.concatenate([np.array(history, dtype=np.int64) for history in histories])
    timestamp = np.concatenate([np.arange(len(history)) for history in histories]).astype(float)
    value = np.arange(len(user), dtype=np.float32)
    items = np.arange(num_items or item.max() + 1)
    return InteractionLog(user, item, timestamp, value, np.arange(len(histories)), items)


def frame_of(**columns: object) -> pandas.DataFrame:
    base = {"user_id": ["b", "a", "b"], "item_id": [7, 7, 3], "timestamp": [2, 5, 1]}
    return pandas.DataFrame(base | columns)


def unpad(row: torch.Tensor) -> list[int]:
    """The entries before the padding, which must be on the right only."""
    kept = row[row >= 0].tolist()
    assert row.tolist() == kept + [-1] * (len(row) - len(kept))
    return kept


# Logs whose few items repeat often and whose timestamps tie.
rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=60)


class TestReadLog:
    def test_numbers_ids_in_order_and_sorts_by_user_and_time(self) -> None:
        log = read_log(frame_of())
        assert log.user_ids.tolist() == ["a", "b"]
        assert log.item_ids.tolist() == [3, 7]
        assert log.user.tolist() == [0, 1, 1]
        assert log.item.tolist() == [1, 0, 1]
        assert log.timestamp.tolist() == [5, 1, 2]
        assert log.value.tolist() == [1, 1, 1]
        assert (log.num_users, log.num_items, len(log)) == (2, 2, 3)
        assert (log.user.dtype, log.item.dtype) == (np.int64, np.int64)
        assert (log.timestamp.dtype, log.value.dtype) == (np.float64, np.float32)

    @settings(deadline=None)
    @given(rows)
    def test_equals_a_plain_sort(self, interactions: list[tuple[int, int, int]]) -> None:
        frame = pandas.DataFrame(interactions, columns=["user_id", "item_id", "timestamp"])
        log = read_log(frame)
        expected = sorted(interactions, key=lambda row: (row[0], row[2]))
        got = zip(log.user_ids[log.user], log.item_ids[log.item], log.timestamp, strict=True)
        assert list(got) == expected

    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".parquet", ".CSV"])
    def test_reads_every_format_alike(self, tmp_path: Path, suffix: str) -> None:
        frame = frame_of(stars=[4.5, 0, 3], title=["one, two", "three", 'four "4"'])
        path = tmp_path / f"log{suffix}"
        if suffix == ".parquet":
            frame.to_parquet(path)
        else:
            frame.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
        log, expected = read_log(path, rating="stars"), read_log(frame, rating="stars")
        for name in ("user", "item", "timestamp", "value", "user_ids", "item_ids"):
            np.testing.assert_array_equal(getattr(log, name), getattr(expected, name))
        assert log.value.tolist() == [0, 3, 4.5]

    def test_ids_of_text_files_keep_what_would_be_lost_as_numbers(self, tmp_path: Path) -> None:
        path = tmp_path / "log.csv"
        path.write_text("user_id,item_id,timestamp\n007,12,1\n7,-3,2\nNA,0,3\nnull,12,4\n")
        log = read_log(path)
        assert log.user_ids.tolist() == ["007", "7", "NA", "null"]
        assert log.item_ids.tolist() == [-3, 0, 12]
        assert log.item_ids.dtype == np.int64

    def test_a_byte_order_mark_is_no_part_of_a_name(self, tmp_path: Path) -> None:
        path = tmp_path / "log.csv"
        path.write_bytes(b"\xef\xbb\xbfuser_id,item_id,timestamp\n1,2,3\n")
        assert read_log(path).timestamp.tolist() == [3]

    @pytest.mark.parametrize(
        "timestamps",
        [
            ["2020-01-03", "2020-01-02T12:00", "2020-01-02 12:00:00+02:00"],
            ["01/03/2020 00:00", "01/02/2020 12:00", "01/02/2020 10:00"],
            pandas.to_datetime(["2020-01-03 00:00", "2020-01-02 12:00", "2020-01-02 10:00"]),
            pandas.to_datetime(["2020-01-03 00:00", "2020-01-02 12:00", "2020-01-02 10:00"]).tz_localize(
                "UTC"
            ),
            ["1578009600", "1577966400.0", "1577959200"],
            pandas.array([1578009600, 1577966400, 1577959200], dtype="Int64"),
        ],
    )
    def test_dates_and_numbers_become_seconds(self, timestamps: object) -> None:
        log = read_log(frame_of(user_id=[1, 1, 1], timestamp=timestamps))
        third = datetime.datetime(2020, 1, 3, tzinfo=datetime.timezone.utc).timestamp()
        assert log.timestamp.tolist() == [third - 14 * 3600, third - 12 * 3600, third]

    def test_calendar_days(self) -> None:
        days = [datetime.date(2020, 1, 3), datetime.date(1970, 1, 1), datetime.date(2020, 1, 2)]
        log = read_log(frame_of(user_id=[1, 1, 1], timestamp=days))
        assert log.timestamp.tolist() == [0, 18263 * 86400, 18264 * 86400]

    def test_behaviours_have_values(self) -> None:
        frame = frame_of(behaviour=["liked", "clicked", "shown"])
        values = {"liked": 10, "clicked": 1, "shown": 0, "bought": 20}
        log = read_log(frame, behaviour="behaviour", behaviour_values=values)
        assert log.value.tolist() == [1, 0, 10]

    def test_behaviours_may_be_numbers(self) -> None:
        log = read_log(frame_of(kind=[1, 2, 1]), behaviour="kind", behaviour_values={1: 0.5, 2: 3})
        assert log.value.tolist() == [3, 0.5, 0.5]

    @pytest.mark.parametrize(
        ("columns", "options", "words"),
        [
            ({"timestamp": ["1", "soon", "later"]}, {}, ["'timestamp'", "row 2", "'soon'", "date", "2 such"]),
            ({"timestamp": [1.0, 2.0, np.inf]}, {}, ["'timestamp'", "row 3", "inf", "number"]),
            ({"timestamp": ["2020-01-01", "2020-13-01", "2020-01-02"]}, {}, ["row 2", "'2020-13-01'"]),
            ({"timestamp": [True, False, True]}, {}, ["'timestamp'", "row 1", "True"]),
            ({"timestamp": [1, None, 2]}, {}, ["'timestamp'", "row 2", "nan", "a value"]),
            ({"user_id": ["a", None, "b"]}, {}, ["'user_id'", "row 2", "a value"]),
            ({"item_id": ["a", "b", ""]}, {}, ["'item_id'", "row 3", "''", "a value"]),
            ({"stars": [1, -0.5, -2]}, {"rating": "stars"}, ["'stars'", "row 2", "-0.5", "from 0", "2 such"]),
            ({"stars": [1, 2, np.nan]}, {"rating": "stars"}, ["'stars'", "row 3", "nan"]),
            ({"stars": [1, 2, np.inf]}, {"rating": "stars"}, ["'stars'", "row 3", "inf"]),
            ({"stars": ["5", "*", "4"]}, {"rating": "stars"}, ["'stars'", "row 2", "'*'"]),
            (
                {"act": ["click", "view", "view"]},
                {"behaviour": "act", "behaviour_values": {"click": 1, "buy": 2}},
                ["'act'", "row 2", "'view'", "['buy', 'click']", "2 such"],
            ),
            ({}, {"behaviour": "act"}, ["behaviour_values=None"]),
            ({}, {"behaviour_values": {"click": 1}}, ["behaviour=None"]),
            ({"act": ["a"] * 3}, {"behaviour": "act", "behaviour_values": {"a": -1}}, ["'a'", "-1"]),
            ({}, {"rating": "stars", "behaviour": "act"}, ["rating='stars'", "behaviour='act'"]),
            (
                {},
                {"timestamp": "time_stamp"},
                ["'time_stamp'", "nearest is 'timestamp'", "'user_id', 'item_id'"],
            ),
            ({}, {"rating": "zzz"}, ["'zzz'", "(rating)", "columns are"]),
            ({}, {"user": "item_id"}, ["column of its own", "item_id"]),
            ({"user_id": np.array([2**63, 1, 2], dtype=np.uint64)}, {}, ["'user_id'", "64-bit", str(2**63)]),
        ],
    )
    def test_bad_input_is_named(self, columns: dict, options: dict, words: list[str]) -> None:
        with pytest.raises(ValueError) as error:
            read_log(frame_of(**columns), **options)
        assert all(word in str(error.value) for word in words), error.value

    @pytest.mark.parametrize("ids", [["a", 1, "b"], [1.5, 2, 3], [True, False, True]])
    def test_ids_of_a_wrong_type(self, ids: list) -> None:
        with pytest.raises(TypeError, match="'item_id': ids need to be whole numbers or strings"):
            read_log(frame_of(item_id=ids))

    def test_whole_floats_are_ids(self) -> None:
        log = read_log(frame_of(item_id=[2.0, 1.0, 2.0]))
        assert log.item_ids.tolist() == [1, 2]
        assert log.item_ids.dtype == np.int64

    def test_an_empty_log(self) -> None:
        with pytest.raises(ValueError, match="DataFrame: an empty log"):
            read_log(frame_of().iloc[:0])

    def test_a_column_that_is_there_twice(self) -> None:
        frame = frame_of(extra=[1, 2, 3]).rename(columns={"extra": "item_id"})
        with pytest.raises(ValueError, match="2 columns are called 'item_id'"):
            read_log(frame)

    def test_a_column_that_is_twice_in_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "log.csv"
        path.write_text("user_id,item_id,timestamp,user_id\n1,5,1,7\n2,6,2,7\n")
        with pytest.raises(ValueError, match="2 columns are called 'user_id', needs one"):
            read_log(path)

    def test_a_quote_in_a_tsv_is_a_letter(self, tmp_path: Path) -> None:
        path = tmp_path / "log.tsv"
        path.write_text('user_id\titem_id\ttimestamp\n1\t"a\t1\n2\tb\t2\n3\tc"\t3\n')
        assert read_log(path).item_ids.tolist() == ['"a', "b", 'c"']

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("log.csv", "", ["is empty", "header"]),
            ("log.csv", "user_id,item_id,timestamp\n", ["an empty log"]),
            ("log.csv", "user_id,item_id,timestamp\n1,2,3\n4,,5\n", ["'item_id'", "row 2", "''"]),
            ("log.csv", "user_id,item_id,timestamp\n1,2,3\n4,5\n", ["'timestamp'", "row 2", "''"]),
            ("log.csv", "user_id,item_id,timestamp\n1,2,3\n4,5,x6\n", ["'timestamp'", "row 2", "'x6'"]),
            ("log.csv", "user_id,item_id,timestamp\n1,2,3\n4,5,6,7\n", ["3 fields in line 3", "saw 4"]),
            ("log.csv", "user_id,item_id,timestamp\n1,2,3,4\n5,6,7,8\n", ["more fields than the header"]),
            ("log.csv", "user_id;item_id;timestamp\n1;2;3\n", ["'user_id'", "user_id;item_id;timestamp"]),
            ("log.csv", b"user_id,item_id,timestamp\n\xff,1,2\n", ["UTF-8"]),
            ("log.parquet", "user_id,item_id,timestamp\n", ["not a readable parquet file"]),
            ("log.xlsx", "", [".csv, .tsv or .parquet"]),
        ],
    )
    def test_bad_files_are_named(
        self, tmp_path: Path, name: str, content: str | bytes, words: list[str]
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError) as error:
            read_log(path)
        assert all(word in str(error.value) for word in [str(path), *words]), error.value

    def test_a_column_missing_from_parquet(self, tmp_path: Path) -> None:
        frame_of().to_parquet(tmp_path / "log.parquet")
        with pytest.raises(
            ValueError, match=r"log.parquet: no column 'userid' \(user\), the nearest is 'user_id'"
        ):
            read_log(tmp_path / "log.parquet", user="userid")

    def test_what_is_no_source(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"missing\.csv"):
            read_log(tmp_path / "missing.csv")
        with pytest.raises(TypeError, match="got list"):
            read_log([1, 2, 3])  # type: ignore[arg-type]

    def test_pandas_is_loaded_only_when_a_log_is_read(self) -> None:
        program = (
            "import sys; sys.modules['pandas'] = None\n"
            "import gflowgr.data\n"
            "try: gflowgr.data.read_log({})\n"
            "except ImportError as error: print(error)"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        )
        assert "pip install 'gflowgr[train]'" in done.stdout


class TestInteractionLog:
    @pytest.mark.parametrize("ids", ["text", "numbers"])
    def test_comes_back_from_a_file_as_it_was(self, tmp_path: Path, ids: str) -> None:
        generator = np.random.default_rng(0)
        names = (
            np.array([f"{number:03}é" for number in range(40)]) if ids == "text" else np.arange(40) * 3 - 5
        )
        log = read_log(
            pandas.DataFrame(
                {
                    "user_id": names[generator.integers(20, size=300)],
                    "item_id": names[generator.integers(40, size=300)],
                    "timestamp": generator.integers(5, size=300) / 3,
                    "stars": generator.random(300),
                }
            ),
            rating="stars",
        )
        log.save(tmp_path / "log")
        back = InteractionLog.load(tmp_path / "log")
        for name in ("user", "item", "timestamp", "value", "user_ids", "item_ids"):
            np.testing.assert_array_equal(getattr(back, name), getattr(log, name))
            assert getattr(back, name).dtype == getattr(log, name).dtype
        assert [path.name for path in tmp_path.iterdir()] == ["log"]

    @settings(deadline=None)
    @given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=1, max_size=6))
    def test_without_the_last_interaction_of_each_user(self, histories: list[list[int]]) -> None:
        log = make_log([*histories, [0, 1]], num_items=12)
        shorter = log.without_last()
        assert by_user(shorter) == [rows[:-1] for rows in by_user(log)]
        # A user of one interaction has none left, but the numbers of the others stay.
        assert shorter.user_ids.tolist() == log.user_ids.tolist()
        assert shorter.item_ids.tolist() == log.item_ids.tolist()
        for name in ("user", "item", "timestamp", "value"):
            assert getattr(shorter, name).dtype == getattr(log, name).dtype

    def test_the_last_of_equal_times_is_the_last_in_order(self) -> None:
        log = read_log(frame_of(user_id=["a"] * 3, item_id=[5, 3, 4], timestamp=[1, 2, 2]))
        assert log.item_ids[log.without_last().item].tolist() == [5, 3]

    def test_nothing_but_last_interactions(self) -> None:
        with pytest.raises(ValueError, match="at least one interaction"):
            make_log([[0], [1]]).without_last()

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "log.parquet"
        make_log([[0, 1, 2]]).save(path)
        before = path.read_bytes()

        def write_half(frame: pandas.DataFrame, target: Path, **options: object) -> None:
            Path(target).write_bytes(before[:100])
            raise OSError("disk full")

        monkeypatch.setattr(pandas.DataFrame, "to_parquet", write_half)
        with pytest.raises(OSError, match="disk full"):
            make_log([[0, 1, 2, 3]]).save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_file_cannot_tell_of_items_without_interactions(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="item_ids"):
            make_log([[0, 1, 2]], num_items=5).save(tmp_path / "log")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("damage", ["truncated", "foreign", "other columns"])
    def test_a_file_that_is_no_log(self, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "log"
        make_log([[0, 1, 2]]).save(path)
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-20])
        elif damage == "foreign":
            path.write_text("user_id,item_id\n")
        else:
            frame_of().to_parquet(path)
        with pytest.raises(ValueError, match=str(path)):
            InteractionLog.load(path)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"user": np.array([], dtype=np.int64)}, "one length"),
            ({"item": np.array([0, 1, 5])}, "0 .. 1 of item_ids"),
            ({"user": np.array([0, 0, -1])}, "0 .. 0 of user_ids"),
            ({"timestamp": np.array([1.0, 0.0, 2.0])}, "row 1"),
        ],
    )
    def test_refuses_what_is_no_log(self, change: dict, words: str) -> None:
        fields = {
            "user": np.zeros(3, dtype=np.int64),
            "item": np.array([0, 1, 0]),
            "timestamp": np.arange(3.0),
            "value": np.ones(3, dtype=np.float32),
            "user_ids": np.array(["u"]),
            "item_ids": np.array(["a", "b"]),
        }
        assert len(InteractionLog(**fields)) == 3
        with pytest.raises(ValueError, match=words):
            InteractionLog(**(fields | change))


class TestKCore:
    @settings(deadline=None)
    @given(rows, st.integers(1, 4))
    def test_equals_dropping_one_by_one(self, interactions: list[tuple[int, int, int]], k: int) -> None:
        frame = pandas.DataFrame(interactions, columns=["user_id", "item_id", "timestamp"])
        log = read_log(frame)
        left = sorted(interactions, key=lambda row: (row[0], row[2]))
        while True:
            users, items = Counter(row[0] for row in left), Counter(row[1] for row in left)
            weak = next((row for row in left if users[row[0]] < k or items[row[1]] < k), None)
            if weak is None:
                break
            left = [row for row in left if row != weak]
        if not left:
            with pytest.raises(ValueError, match=f"k={k}"):
                k_core(log, k)
            return
        core = k_core(log, k)
        got = zip(core.user_ids[core.user], core.item_ids[core.item], core.timestamp, strict=True)
        assert list(got) == left
        assert core.num_users == len({row[0] for row in left})
        assert core.num_items == len({row[1] for row in left})

    def test_needs_more_than_one_round(self) -> None:
        # Dropping user 2 leaves item 2 with one interaction, and dropping that leaves user 1 with two.
        log = make_log([[0, 1, 3, 0, 1, 3], [0, 1, 2], [2], [0, 1, 3]])
        core = k_core(log, 3)
        assert core.user_ids.tolist() == [0, 3]
        assert core.item_ids.tolist() == [0, 1, 3]

    def test_says_which_k_would_leave_something(self) -> None:
        log = make_log([[0, 1, 0, 1], [0, 1]])
        with pytest.raises(
            ValueError, match=r"6 interactions of 2 users with 2 items; the largest k .* is 2"
        ):
            k_core(log, 5)
        assert len(k_core(log, 2)) == 6

    @pytest.mark.parametrize(("k", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
    def test_k_is_a_number_from_1_on(self, k: object, error: type[Exception]) -> None:
        with pytest.raises(error, match="k needs to be"):
            k_core(make_log([[0]]), k)  # type: ignore[arg-type]


def expected_example(
    history: list[tuple[int, float]], part: list[tuple[int, float]], position: int, sizes: tuple[int, int]
) -> dict:
    """One example in plain Python: `history` before the part, the target at `position` of `part`."""
    before = [item for item, _ in history + part[:position]]
    target, value = part[position]
    future: dict[int, float] = {}
    for item, worth in part[position + 1 :]:
        if item != target and item not in future:
            future[item] = worth
    return {
        "history": before[-sizes[0] :],
        "target": target,
        "value": value,
        "future": list(future)[: sizes[1]],
        "future_value": list(future.values())[: sizes[1]],
    }


def check_examples(examples: Examples, expected: list[dict], sizes: tuple[int, int]) -> None:
    assert len(examples) == len(expected)
    assert examples.index.tolist() == list(range(len(expected)))
    assert examples.history.shape == (len(expected), sizes[0])
    assert examples.future.shape == examples.future_value.shape == (len(expected), sizes[1])
    for row, want in zip(examples, expected, strict=False):
        assert unpad(row["history"]) == want["history"]
        assert unpad(row["future"]) == want["future"]
        padding = [0.0] * (sizes[1] - len(want["future"]))
        assert row["future_value"].tolist() == want["future_value"] + padding
        assert row["user"] == want["user"]
        assert row["target"] == want["target"]
        assert row["value"] == want["value"]
    for name in ("index", "user", "history", "target", "future"):
        assert getattr(examples, name).dtype == torch.int64
    assert examples.value.dtype == examples.future_value.dtype == torch.float32


def by_user(log: InteractionLog) -> list[list[tuple[int, float, float]]]:
    return [
        [
            (int(log.item[row]), float(log.value[row]), float(log.timestamp[row]))
            for row in np.flatnonzero(log.user == user)
        ]
        for user in range(log.num_users)
    ]


def check_split(result: Split, parts: list[list[list[tuple[int, float]]]], sizes: tuple[int, int]) -> None:
    """`parts[user]` holds the user's three parts."""
    expected: list[list[dict]] = [[], [], []]
    for user, (training, validation, test) in enumerate(parts):
        for position in range(1, len(training)):
            expected[0].append(expected_example([], training, position, sizes) | {"user": user})
        for number, part, before in ((1, validation, training), (2, test, training + validation)):
            if part and before:
                expected[number].append(expected_example(before, part, 0, sizes) | {"user": user})
    for examples, want in zip((result.train, result.validation, result.test), expected, strict=True):
        check_examples(examples, want, sizes)
    sequences = result.sequences
    assert sequences.offsets.tolist() == np.cumsum([0, *(len(part[0]) for part in parts)]).tolist()
    assert sequences.items.tolist() == [item for part in parts for item, _ in part[0]]
    assert sequences.values.tolist() == [value for part in parts for _, value in part[0]]


class TestLeaveOneOut:
    @settings(deadline=None)
    @given(
        st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=25), min_size=1, max_size=6),
        st.integers(1, 6),
        st.integers(0, 4),
    )
    def test_equals_plain_python(self, histories: list[list[int]], max_history: int, max_future: int) -> None:
        histories = [*histories, [0, 1, 2, 3]]
        log = make_log(histories)
        result = split(log, max_history=max_history, max_future=max_future)
        parts = []
        for rows in by_user(log):
            pairs = [(item, value) for item, value, _ in rows]
            parts.append([pairs[:-2], pairs[-2:-1], pairs[-1:]])
        check_split(result, parts, (max_history, max_future))
        assert result.num_items == log.num_items

    @settings(deadline=None)
    @given(
        st.lists(st.lists(st.integers(0, 8), min_size=2, max_size=25), min_size=1, max_size=6),
        st.integers(1, 6),
        st.integers(0, 4),
    )
    def test_one_held_out_item_is_for_validation(
        self, histories: list[list[int]], max_history: int, max_future: int
    ) -> None:
        log = make_log([*histories, [0, 1, 2]])
        result = split(log, held_out=1, max_history=max_history, max_future=max_future)
        parts = []
        for rows in by_user(log):
            pairs = [(item, value) for item, value, _ in rows]
            parts.append([pairs[:-1], pairs[-1:], []])
        check_split(result, parts, (max_history, max_future))
        assert len(result.test) == 0 and len(result.validation) == log.num_users

    @settings(deadline=None)
    @given(st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=9), min_size=1, max_size=6))
    def test_a_log_without_its_test_items_trains_and_validates_alike(
        self, histories: list[list[int]]
    ) -> None:
        log = make_log([*histories, [0, 1, 2, 3]])
        whole, without = split(log), split(log.without_last(), held_out=1)
        for name in ("train", "validation", "histories"):
            first, second = getattr(whole, name), getattr(without, name)
            assert all(torch.equal(field, second.tensors()[key]) for key, field in first.tensors().items())
            if name == "validation":
                for earlier in zip(first.taken(), second.taken(), strict=True):
                    np.testing.assert_array_equal(*earlier)
        np.testing.assert_array_equal(whole.sequences.items, without.sequences.items)
        np.testing.assert_array_equal(whole.sequences.offsets, without.sequences.offsets)
        assert whole.num_items == without.num_items

    def test_one_held_out_item_needs_two_interactions_of_each_user(self) -> None:
        log = make_log([[0, 1, 2], [0], [2, 3], [1]])
        with pytest.raises(
            ValueError, match=r"needs 2 interactions .* 2 of 4 users .* user 1 has 1; k_core.*2"
        ):
            split(log, held_out=1)

    def test_by_hand(self) -> None:
        result = split(make_log([[5, 6, 5, 7, 7, 8, 9, 4]]), max_history=3, max_future=2)
        assert result.train.history.tolist() == [[5, -1, -1], [5, 6, -1], [5, 6, 5], [6, 5, 7], [5, 7, 7]]
        assert result.train.target.tolist() == [6, 5, 7, 7, 8]
        assert result.train.future.tolist() == [[5, 7], [7, 8], [8, -1], [8, -1], [-1, -1]]
        assert result.train.future_value.tolist() == [[2, 3], [3, 5], [5, 0], [5, 0], [0, 0]]
        assert result.validation.history.tolist() == [[7, 7, 8]]
        assert (result.validation.target.item(), result.test.target.item()) == (9, 4)
        assert result.test.history.tolist() == [[7, 8, 9]]
        assert result.validation.future.tolist() == result.test.future.tolist() == [[-1, -1]]

    def test_a_long_run_of_one_item(self) -> None:
        result = split(make_log([[0] * 50 + [1, 2, 3, 4, 5]]), max_future=5)
        assert result.train.future[0].tolist() == [1, 2, 3, -1, -1]

    def test_a_user_who_takes_the_same_few_items_all_the_time(self) -> None:
        # Rows that look ahead one by one would never find five, and read what is left of 60,000 each.
        result = split(make_log([[0, 1, 2] * 20_000 + [3, 4]]), max_future=5)
        future, target = result.train.future, result.train.target
        assert future[:-2, :2].tolist() == torch.stack([(target + 1) % 3, (target + 2) % 3], 1)[:-2].tolist()
        assert (future[:, 2:] == -1).all()
        assert future[-2:].tolist() == [[2, -1, -1, -1, -1], [-1, -1, -1, -1, -1]]

    def test_users_with_too_few_interactions(self) -> None:
        log = make_log([[0, 1, 2, 3], [0, 1], [2, 3, 1], [1]])
        with pytest.raises(ValueError, match=r"needs 3 interactions .* 2 of 4 users .* user 3 has 1; k_core"):
            split(log)

    def test_no_training_example(self) -> None:
        with pytest.raises(ValueError, match="no example for the training part"):
            split(make_log([[0, 1, 2], [2, 1, 0]]))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"max_history": 0}, "max_history needs to be at least 1, got 0"),
            ({"max_future": -1}, "max_future needs to be at least 0, got -1"),
            ({"max_items": 1}, "max_items needs to be at least 2, got 1"),
            ({"method": "random"}, "'random'"),
            ({"held_out": 0}, "held_out needs to be 2, or 1 with method .*, got 0"),
            ({"held_out": 3}, "held_out .* got 3"),
            ({"held_out": 1, "method": "time"}, "held_out .* got 1"),
            ({"method": "time", "test_fraction": 0}, "test_fraction .* got 0"),
            ({"method": "time", "test_fraction": 0.5, "validation_fraction": 0.5}, "less than 1"),
        ],
    )
    def test_arguments_out_of_range(self, options: dict, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            split(make_log([[0, 1, 2, 3]]), **options)


class TestTimeSplit:
    @settings(deadline=None)
    @given(rows, st.sampled_from([0.1, 0.2, 0.4]), st.sampled_from([0.1, 0.3]))
    def test_equals_plain_python(
        self, interactions: list[tuple[int, int, int]], validation: float, test: float
    ) -> None:
        frame = pandas.DataFrame(interactions, columns=["user_id", "item_id", "timestamp"])
        log = read_log(frame.assign(stars=np.arange(len(frame))), rating="stars")
        first, second = np.quantile(frame.timestamp, [1 - validation - test, 1 - test])
        parts: list[list[list[tuple[int, float]]]] = []
        for user_rows in by_user(log):
            parts.append([[], [], []])
            for item, value, moment in user_rows:
                parts[-1][int(moment >= first) + int(moment >= second)].append((item, value))
        possible = (
            any(len(part[0]) > 1 for part in parts)
            and any(part[0] and part[1] for part in parts)
            and any((part[0] or part[1]) and part[2] for part in parts)
        )
        options = {
            "validation_fraction": validation,
            "test_fraction": test,
            "max_history": 4,
            "max_future": 3,
        }
        if possible:
            check_split(split(log, "time", **options), parts, (4, 3))
        else:
            with pytest.raises(ValueError, match="no example for the"):
                split(log, "time", **options)

    def test_the_future_leaks_nowhere(self) -> None:
        generator = np.random.default_rng(0)
        # Each interaction has an item of its own, so that an item tells its moment.
        moments = generator.permutation(2000) // 3
        frame = pandas.DataFrame(
            {"user_id": generator.integers(50, size=2000), "item_id": np.arange(2000), "timestamp": moments}
        )
        result = split(read_log(frame), "time", test_fraction=0.2, validation_fraction=0.1)
        trained = moments[result.sequences.items]
        for examples in (result.validation, result.test):
            targets = moments[examples.target.numpy()]
            assert trained.max() < targets.min()
            before = examples.history.numpy()
            assert (np.where(before >= 0, moments[before], -1) <= targets[:, None]).all()
            after = examples.future.numpy()
            assert (np.where(after >= 0, moments[after], 10**6) >= targets[:, None]).all()
        assert moments[result.validation.target.numpy()].max() < moments[result.test.target.numpy()].min()
        assert abs(len(result.sequences.items) / 2000 - 0.7) < 0.01
        assert len(set(result.test.user.tolist())) == len(result.test)

    def test_one_moment_cannot_be_divided(self) -> None:
        log = read_log(pandas.DataFrame({"user_id": [1] * 6, "item_id": range(6), "timestamp": [3] * 6}))
        with pytest.raises(ValueError, match="no example for the training part"):
            split(log, "time")


class TestHistories:
    @settings(deadline=None)
    @given(
        st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=40), min_size=1, max_size=6),
        st.integers(2, 9),
    )
    def test_every_training_item_but_the_first_is_a_target_once(
        self, histories: list[list[int]], max_items: int
    ) -> None:
        log = make_log([*histories, [0, 1, 2, 3]])
        result = split(log, max_items=max_items)
        whole = result.histories
        assert whole.index.tolist() == list(range(len(whole)))
        assert whole.items.shape == whole.value.shape == (len(whole), max_items)
        targets = Counter()
        for row in whole:
            items = unpad(row["items"])
            assert len(items) >= 2
            # A value is a row number of the log, which tells which interaction this is.
            numbers = row["value"][: len(items)].tolist()
            assert numbers == list(range(int(numbers[0]), int(numbers[0]) + len(items)))
            assert log.item[int(numbers[0]) :][: len(items)].tolist() == items
            assert (log.user[[int(number) for number in numbers]] == row["user"].item()).all()
            assert not row["value"][len(items) :].any()
            targets.update(numbers[1:])
        assert targets == Counter(result.train.value.tolist())
        assert whole.contexts() * len(whole) == pytest.approx(sum(targets.values()))
        latest = {int(row["user"]): int(row["index"]) for row in whole}
        assert whole.further(2).tolist() == [
            2 * (latest[row["user"].item()] == row["index"]) for row in whole
        ]
        room = [min(2, max_items - len(unpad(whole[index]["items"]))) for index in latest.values()]
        assert (whole.contexts(2) - whole.contexts()) * len(whole) == pytest.approx(sum(room), abs=1e-3)

    def test_the_latest_row_is_full(self) -> None:
        result = split(make_log([list(range(9))]), max_items=4)
        assert result.histories.items.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
        result = split(make_log([list(range(10))]), max_items=4)
        assert result.histories.items.tolist() == [[0, 1, -1, -1], [1, 2, 3, 4], [4, 5, 6, 7]]

    def test_a_row_holds_a_history_and_its_target_by_default(self) -> None:
        assert split(make_log([list(range(9))]), max_history=7).histories.items.shape[1] == 8


class TestDataset:
    def examples(self) -> Examples:
        return split(make_log([list(range(9)), [3, 4, 5, 1, 1]]), max_history=4, max_future=2).train

    def test_batches_of_a_data_loader_are_rows(self) -> None:
        examples = self.examples()
        order = [3, 0, 6, 1, 4]
        loader = torch.utils.data.DataLoader(examples, batch_size=2, sampler=order, collate_fn=collate)
        batches = list(loader)
        assert [len(batch["index"]) for batch in batches] == [2, 2, 1]
        for name in ("index", "user", "history", "target", "value", "future", "future_value"):
            joined = torch.cat([batch[name] for batch in batches])
            torch.testing.assert_close(joined, getattr(examples, name)[order], rtol=0, atol=0)

    def test_one_and_many_rows_agree(self) -> None:
        examples = self.examples()
        many = examples.__getitems__([2, 5])
        for row, number in zip(many, (2, 5), strict=True):
            one = examples[number]
            assert row.keys() == one.keys()
            assert all(torch.equal(row[name], one[name]) for name in one)

    def test_a_selection_keeps_its_index(self) -> None:
        examples = self.examples()
        chosen = examples.select([4, 2])
        assert isinstance(chosen, Examples)
        assert chosen.index.tolist() == [4, 2]
        assert torch.equal(chosen.history, examples.history[[4, 2]])

    def test_all_that_came_before(self) -> None:
        histories = [[0, 1, 2, 3, 1, 4], [5, 2, 0]]
        parts = split(make_log(histories), max_history=2)
        assert [items.tolist() for items in parts.test.taken()] == [[0, 1, 2, 3, 1], [5, 2]]
        assert [items.tolist() for items in parts.validation.taken()] == [[0, 1, 2, 3], [5]]
        assert parts.test.history.tolist() == [[3, 1], [5, 2]]
        assert [items.tolist() for items in parts.test.select([1]).taken()] == [[5, 2]]
        assert "earlier" not in parts.test[0]
        # Of training nothing is kept but what is read.
        assert parts.train.taken() is parts.train.history

    def test_fields_of_different_length(self) -> None:
        fields = vars(self.examples()) | {"target": torch.zeros(2, dtype=torch.int64)}
        with pytest.raises(ValueError, match=r"Examples needs fields of one length, got .*'target': 2"):
            Examples(**fields)
        fields = vars(self.examples()) | {"earlier": [np.arange(3)]}
        with pytest.raises(ValueError, match="'earlier': 1"):
            Examples(**fields)

    def test_nothing_to_collate(self) -> None:
        with pytest.raises(ValueError, match="at least one example"):
            collate([])

    def test_whole_histories_are_cut_to_the_longest_of_a_batch(self) -> None:
        histories = split(make_log([[0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4, 5, 0, 1]]), max_history=8).histories
        batch = collate(histories.__getitems__([0, 1]))
        assert batch["items"].tolist() == [[0, 1, 2, 3], [3, 4, 5, -1]]
        assert batch["value"].shape == (2, 4)


class TestBatchesOfLikeLength:
    @given(st.lists(st.integers(2, 9), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 3))
    def test_every_row_once_and_only_the_last_batch_short(
        self, lengths: list[int], batch_size: int, seed: int
    ) -> None:
        rows = LikeLengths(histories_of(lengths), batch_size, seed)
        assert sorted(rows) == list(range(len(lengths)))
        assert len(rows) == len(lengths)

    def test_batches_hold_like_lengths(self) -> None:
        lengths = torch.randint(2, 20, (640,), generator=torch.Generator().manual_seed(0))
        drawn = lengths[list(LikeLengths(histories_of(lengths.tolist()), 10, 0))].view(-1, 10)
        # All of them are one group, so that sorted batches span few lengths; at random they would span 15.
        assert float((drawn.amax(1) - drawn.amin(1)).float().mean()) < 2
        # And short batches do not all come first.
        assert 5 < float(drawn[:32].float().mean()) < 15

    def test_the_order_is_a_function_of_seed_and_epoch(self) -> None:
        histories = histories_of([3] * 40)
        orders = []
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 1)):
            rows = LikeLengths(histories, 8, seed)
            rows.set_epoch(epoch)
            orders.append(list(rows))
        assert orders[1] == orders[3]
        assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]

    def test_a_data_loader_sets_the_epoch(self) -> None:
        rows = LikeLengths(histories_of([3] * 40), 8, 0)
        loader = Accelerator(cpu=True).prepare(
            torch.utils.data.DataLoader(torch.arange(40), batch_size=8, sampler=rows)
        )
        epochs = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            epochs.append(torch.cat(list(loader)).tolist())
        assert epochs[0] != epochs[1]
        assert sorted(epochs[1]) == list(range(40))


def histories_of(lengths: list[int]) -> Histories:
    width = max(lengths)
    items = torch.tensor([[0] * length + [-1] * (width - length) for length in lengths])
    index = torch.arange(len(lengths))
    return Histories(index, index, items, torch.ones(items.shape))
