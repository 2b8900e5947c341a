"""Byte for byte what pandas does, as in the published code."""

from pathlib import Path

import pandas as pd
import pytest

from twostage.data.downsampling import RATES, downsample, downsample_folder
from twostage.data.tables import Table, write_table
from twostage.errors import DataError, UsageError

HOSTILE = ["null", "NA", "nan", "None", "n/a", "", "a, b", 'say "x"', "“ü” 好 🙂", "x", '"', "  "]


def published(input_path: Path, output_path: Path, rate: float) -> None:
    """The published procedure, in pandas."""
    read = {"sep": "\t", "keep_default_na": False}
    train = pd.read_csv(input_path / "train.tsv", **read)
    test = pd.read_csv(input_path / "dev.tsv", **read)
    positive, negative = train[train.label == 1], train[train.label == 0]
    negative = negative.sample(n=int(len(positive) * rate), random_state=42)
    mixed = pd.concat([positive, negative]).sample(frac=1, random_state=42)
    output_path.mkdir(parents=True)
    for frame, name in ((mixed, "train.csv"), (test, "test.csv")):
        frame.rename(columns={"sentence": "text"}).to_csv(output_path / name, index=False)


def synthetic_folder(folder: Path, positives: int, negatives: int) -> Path:
    rows = [(f"{HOSTILE[i % len(HOSTILE)]} {i}".lstrip(), 1) for i in range(positives)]
    rows += [(HOSTILE[i % len(HOSTILE)], 0) for i in range(negatives)]
    rows = rows[::2] + rows[1::2]
    for name in ("train.tsv", "dev.tsv"):
        write_table(folder / name, ("sentence", "label"), rows)
    return folder


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("counts", [(90, 130), (11, 10), (37, 1001)])
def test_files_equal_pandas_on_hostile_text(
    tmp_path: Path, rate: float, counts: tuple[int, int]
) -> None:
    source = synthetic_folder(tmp_path / "in", *counts)
    downsample_folder(source, tmp_path / "ours", (rate,))
    published(source, tmp_path / "theirs", rate)
    for name in ("train.csv", "test.csv"):
        ours = (tmp_path / "ours" / str(rate) / name).read_bytes()
        assert ours == (tmp_path / "theirs" / name).read_bytes()


def test_files_equal_pandas_on_the_demo_data_at_all_seven_rates(
    demo_folder: Path, tmp_path: Path
) -> None:
    written = downsample_folder(demo_folder, tmp_path / "ours")
    assert [folder.name for folder, _, _ in written] == [str(rate) for rate in RATES]
    for rate in RATES:
        published(demo_folder, tmp_path / "theirs" / str(rate), rate)
        for name in ("train.csv", "test.csv"):
            ours = (tmp_path / "ours" / str(rate) / name).read_bytes()
            assert ours == (tmp_path / "theirs" / str(rate) / name).read_bytes()


def test_the_number_of_negatives_is_the_float64_product_cut_off() -> None:
    table = Table(["x"] * 200, [1] * 90 + [0] * 110)
    assert downsample(table, 0.7)[1].count(0) == 62  # 90 × 0.7 is 62.999…
    assert downsample(table, 0.7)[1].count(1) == 90


def test_sst2_at_rate_0_2_has_the_published_number_of_rows() -> None:
    table = Table(["x"] * 67_349, [1] * 37_569 + [0] * 29_780)
    assert len(downsample(table, 0.2)[0]) == 45_082


def test_more_negatives_than_there_are_is_one_sentence() -> None:
    with pytest.raises(
        DataError, match=r"has 5 negatives; rate 0\.5 of its 20 positives asks for 10"
    ):
        downsample(Table(["x"] * 25, [1] * 20 + [0] * 5), 0.5)


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, float("nan")])
def test_a_rate_outside_0_to_1_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="rate is"):
        downsample(Table(["a", "b"], [0, 1]), rate)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_cannot_take_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="seed is"):
        downsample(Table(["a", "b"], [0, 1]), 0.5, seed)


def test_a_class_that_would_vanish_is_named() -> None:
    with pytest.raises(DataError, match=r"rate 0\.1: class 0 \(negative\) has no row left"):
        downsample(Table(["a"] * 12, [1, 1, 1] + [0] * 9), 0.1)


def test_labels_other_than_0_and_1_are_refused() -> None:
    with pytest.raises(DataError, match=r"row 1: class '2' \(no such row in SST-2"):
        downsample(Table(["a", "b"], [1, 2]), 0.5)
