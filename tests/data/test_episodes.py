import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_from_disk
from hub_server import TOKEN, LocalHub

from dmgal_hf.data import episodes as episodes_module
from dmgal_hf.data.episodes import EpisodeSource, check_episodes, episodes_id, load_episodes, sample_episodes

# Seven classes of 4 to 16 clips, in mixed order; class 5 is missing on purpose.
LABELS = [label for place in range(16) for label in (3, 0, 7, 1, 6, 4, 2) if place < 4 + 2 * label]
COLUMNS = ["support", "support_labels", "query", "query_labels"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# A slow, plain version of the whole draw, numpy's bit generator included.


def plain_philox(seed, index):
    """Philox 4x64 with 10 rounds from its paper's definition, key (seed, index), counters 1, 2, ..."""
    mask = 2**64 - 1
    counter = 0
    while True:
        counter += 1
        x0, x1, x2, x3 = counter, 0, 0, 0
        key0, key1 = seed, index
        for _ in range(10):
            product0, product1 = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
            x0, x1 = (product1 >> 64) ^ x1 ^ key0, product1 & mask
            x2, x3 = (product0 >> 64) ^ x3 ^ key1, product0 & mask
            key0, key1 = (key0 + 0x9E3779B97F4A7C15) & mask, (key1 + 0xBB67AE8584CAA73B) & mask
        yield from (x0, x1, x2, x3)


def plain_shuffle_start(words, items, count):
    items = list(items)
    for place in range(count):
        bound = len(items) - place
        word = next(words)
        while word // bound == 2**64 // bound:  # in the last, incomplete run of `bound` words
            word = next(words)
        other = place + word % bound
        items[place], items[other] = items[other], items[place]
    return items[:count]


def plain_episode(labels, way, shot, query, seed, index):
    words = plain_philox(seed, index)
    episode = {name: [] for name in COLUMNS}
    for episode_label, chosen in enumerate(plain_shuffle_start(words, sorted(set(labels)), way)):
        rows = [row for row, label in enumerate(labels) if label == chosen]
        rows = plain_shuffle_start(words, rows, shot + query)
        episode["support"] += rows[:shot]
        episode["support_labels"] += [episode_label] * shot
        episode["query"] += rows[shot:]
        episode["query_labels"] += [episode_label] * query
    return episode


def plain_faults(episode, labels):
    """Whether an episode is unsound, clip by clip."""
    rows = episode["support"] + episode["query"]
    episode_labels = episode["support_labels"] + episode["query_labels"]
    if len(set(rows)) < len(rows) or any(not 0 <= row < len(labels) for row in rows):
        return True
    if sorted(set(episode["support_labels"])) != list(range(len(set(episode["support_labels"])))):
        return True
    if len(set(episode["support_labels"])) < 2 or not set(episode["query_labels"]) <= set(episode["support_labels"]):
        return True
    pairs = {(episode_label, labels[row]) for row, episode_label in zip(rows, episode_labels, strict=True)}
    return len(pairs) != len({pair[0] for pair in pairs}) or len(pairs) != len({pair[1] for pair in pairs})


@pytest.mark.parametrize(
    ("way", "shot", "query", "seed", "index"),
    [(5, 1, 1, 0, 0), (2, 2, 2, 1, 7), (7, 1, 3, 2**64 - 1, 2**64 - 1), (3, 3, 1, 12345, 10**15)],
)
def test_draws_as_the_plain_version(way, shot, query, seed, index):
    assert EpisodeSource(LABELS, way, shot, query, seed)[index] == plain_episode(LABELS, way, shot, query, seed, index)


def test_draws_with_more_random_numbers_than_one_read_gives():
    labels = list(range(20)) * 12
    assert EpisodeSource(labels, 20, 5, 5, seed=3)[4] == plain_episode(labels, 20, 5, 5, 3, 4)


def test_golden_episodes():
    source = EpisodeSource(LABELS, way=5, shot=1, query=1, seed=0)
    assert source[0]["support"] == [24, 40, 16, 15, 48]
    assert source[0]["query"] == [3, 7, 51, 1, 38]
    assert source[10**12]["support"] == [40, 62, 15, 53, 17]
    assert source[10**12]["query"] == [21, 56, 1, 43, 10]
    assert episodes_id(sample_episodes(LABELS, 5, 2, 2, num_episodes=100, seed=42)) == "a04c8035f02f846f"


def test_bounded_draw_is_unbiased():
    # 2**64 = 3 * k + 1: the last word would favour 0, and is dropped. A power of two drops nothing.
    assert episodes_module._draw_below(iter([2**64 - 1, 2**64 - 1, 5]), 3) == 2
    assert episodes_module._draw_below(iter([2**64 - 2]), 3) == 2
    assert episodes_module._draw_below(iter([2**64 - 1]), 4) == 3
    # The largest bound of which little more than half the words may be used.
    assert episodes_module._draw_below(iter([2**63 + 1, 2**63]), 2**63 + 1) == 2**63


@pytest.mark.slow
def test_every_class_clip_and_order_is_equally_likely():
    labels = [0, 1, 2, 3] * 3
    source = EpisodeSource(labels, way=2, shot=1, query=1, seed=9)
    draws = 12_000
    class_pairs, clip_pairs = np.zeros((4, 4)), np.zeros((12, 12))
    for index in range(draws):
        episode = source[index]
        class_pairs[labels[episode["support"][0]], labels[episode["support"][1]]] += 1
        clip_pairs[episode["support"][0], episode["query"][0]] += 1
    for counts, cells in ((class_pairs, 12), (clip_pairs, 24)):
        assert np.count_nonzero(counts) == cells
        expected = draws / cells
        chi_square = ((counts[counts > 0] - expected) ** 2 / expected).sum()
        assert chi_square < cells - 1 + 4 * np.sqrt(2 * (cells - 1))


def test_streams_of_different_seeds_and_episodes_share_nothing():
    words = []
    for seed in (0, 1, 2, 2**32, 2**64 - 1):
        for index in (0, 1, 2, 2**32, 2**64 - 1):
            stream = episodes_module._random_words(seed, index)
            words += [next(stream) for _ in range(200)]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize(("way", "shot", "query"), [(2, 1, 1), (5, 1, 2), (7, 3, 1), (3, 2, 2)])
def test_episodes_are_sound(way, shot, query):
    source = EpisodeSource(LABELS, way, shot, query, seed=5)
    for index in range(50):
        episode = source[index]
        assert len(episode["support"]) == way * shot
        assert len(episode["query"]) == way * query
        assert episode["support_labels"] == sorted(episode["support_labels"])
        assert not plain_faults(episode, LABELS)


def as_column(labels, **kwargs):
    return Dataset.from_dict({"label": labels}, **kwargs)["label"]


@pytest.mark.parametrize(
    "convert",
    [
        tuple,
        np.array,
        lambda labels: np.array(labels, dtype=np.uint8),
        torch.tensor,
        as_column,
        lambda labels: as_column(labels, features=Features({"label": ClassLabel(num_classes=8)})),
        lambda labels: Dataset.from_dict({"label": labels}).with_format("torch")["label"],
    ],
)
def test_labels_of_any_kind_give_the_same_episodes(convert):
    source = EpisodeSource(convert(LABELS), way=3, seed=1)
    assert [source[index] for index in range(5)] == [EpisodeSource(LABELS, way=3, seed=1)[i] for i in range(5)]
    check_episodes(sample_episodes(LABELS, num_episodes=3), convert(LABELS))


@pytest.mark.slow
def test_workers_and_pickles_draw_the_same_episodes_in_any_order():
    source = EpisodeSource(LABELS, way=3, shot=2, query=1, seed=4)
    order = [5, 0, 10**9, 3, 2, 7]
    expected = [source[index] for index in order]
    for num_workers in (0, 1, 2):
        loader = torch.utils.data.DataLoader(source, sampler=order, batch_size=None, num_workers=num_workers)
        assert list(loader) == expected
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[index] for index in np.array(order)[::-1]] == expected[::-1]


def test_a_list_holds_the_first_episodes_of_the_source():
    episodes = sample_episodes(LABELS, way=3, shot=2, query=1, num_episodes=20, seed=8)
    source = EpisodeSource(LABELS, way=3, shot=2, query=1, seed=8)
    assert episodes.to_list() == [source[index] for index in range(20)]
    assert episodes.features == Features({name: List(Value("int64")) for name in COLUMNS})
    assert episodes.cache_files == []
    origin = json.loads(episodes.info.description)
    fingerprint = origin.pop("labels_fingerprint")
    assert origin == {"way": 3, "shot": 2, "query": 1, "seed": 8, "num_videos": len(LABELS)}
    other = sample_episodes(LABELS[:-1] + [0], way=3, num_episodes=1)
    assert json.loads(other.info.description)["labels_fingerprint"] != fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, "labels are empty"),
        ({"labels": [0, 1, -1, 1, -1]}, r"row 2 holds -1 \(2 such rows"),
        ({"labels": [0, 1, 1.5]}, r"row 2 holds 1\.5"),
        ({"labels": as_column([0, None, 1])}, "row 1 holds None"),
        ({"labels": ["run", "jump"]}, "row 0 holds 'run'"),
        ({"labels": [True, False]}, "row 0 holds True"),
        ({"labels": np.zeros((4, 2), dtype=int)}, r"shape \(4, 2\)"),
        ({"labels": [0, 0, 3, 3]}, "5-way episodes need 5 classes, but the labels hold 2"),
        ({"way": 1}, "way must be at least 2 and below 2\\*\\*64, got 1"),
        ({"way": 2.0}, "way must be an integer, got 2.0"),
        ({"shot": 0}, "shot must be at least 1"),
        ({"shot": True}, "shot must be an integer, got True"),
        ({"query": -3}, "query must be at least 1 and below 2\\*\\*64, got -3"),
        ({"seed": -1}, "seed must be at least 0 and below 2\\*\\*64, got -1"),
        ({"seed": 2**64}, "seed must be at least 0 and below"),
        ({"class_names": ["a", "b"]}, "label 7 has no name: class_names holds 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSource(**{"labels": LABELS, **arguments})


def test_classes_with_too_few_clips_are_all_named():
    with pytest.raises(ValueError, match=r"7 videos .* 2 of 7 classes have fewer: 0 \(4 videos\), 1 \(6 videos\)\."):
        EpisodeSource(LABELS, way=3, shot=5, query=2)
    names = ["clap", "sit down", "run", "jump", "wave", "fall", "eat", "hug"]
    with pytest.raises(ValueError, match=r"0 \('clap', 4 videos\), 1 \('sit down', 6 videos\)\."):
        sample_episodes(LABELS, way=3, shot=5, query=2, class_names=names)
    EpisodeSource(LABELS, way=3, shot=2, query=2, class_names=names)  # exactly enough


def test_bad_episode_numbers():
    source = EpisodeSource(LABELS)
    for index in (-1, 2**64):
        with pytest.raises(IndexError, match="numbered from 0"):
            source[index]
    with pytest.raises(ValueError, match="num_episodes must be at least 1"):
        sample_episodes(LABELS, num_episodes=0)


@pytest.fixture
def episodes():
    return sample_episodes(LABELS, way=3, shot=2, query=1, num_episodes=12, seed=8)


@pytest.mark.slow
def test_saved_lists_come_back(episodes, tmp_path):
    name = episodes_id(episodes)
    episodes.save_to_disk(tmp_path / "saved")
    DatasetDict(val=episodes.select([0]), test=episodes).save_to_disk(tmp_path / "splits")
    episodes.to_parquet(tmp_path / "list.parquet")
    # The files of a repository made by push_to_hub.
    episodes.to_parquet(tmp_path / "repository" / "data" / "test-00000-of-00001.parquet")
    for path, split, keeps_origin in (
        (tmp_path / "saved", "train", True),
        (str(tmp_path / "splits"), "test", True),
        (tmp_path / "list.parquet", "train", False),
        (str(tmp_path / "repository"), "test", False),
    ):
        loaded = load_episodes(path, LABELS, split=split)
        assert loaded.to_list() == episodes.to_list()
        assert loaded.features == episodes.features
        assert episodes_id(loaded) == name
        assert loaded.info.description == (episodes.info.description if keeps_origin else "")
    assert load_from_disk(tmp_path / "saved").info.description == episodes.info.description


SHARE = """
from dmgal_hf.data.episodes import episodes_id, load_episodes, sample_episodes

labels = [row % 6 for row in range(60)]
sample_episodes(labels, way=3, shot=2, query=1, num_episodes=12, seed=8).push_to_hub("org/episodes")
print(episodes_id(load_episodes("org/episodes", labels)))
"""


@pytest.mark.slow
def test_a_list_comes_back_from_the_hub(tmp_path, monkeypatch):
    with LocalHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        done = subprocess.run([sys.executable, "-c", SHARE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = sample_episodes([row % 6 for row in range(60)], way=3, shot=2, query=1, num_episodes=12, seed=8)
    assert done.stdout.strip() == episodes_id(drawn)


def test_lists_that_cannot_be_loaded(episodes, tmp_path):
    DatasetDict(val=episodes).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="no split 'test': it holds val"):
        load_episodes(tmp_path / "splits", LABELS, split="test")
    with pytest.raises(ValueError, match="revision='v1'"):
        load_episodes(tmp_path / "splits", LABELS, split="val", revision="v1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a dataset saved by save_to_disk nor parquet"):
        load_episodes(tmp_path / "empty", LABELS)
    (tmp_path / "list.json").write_text("{}")
    with pytest.raises(ValueError, match=r"list\.json is no episode list"):
        load_episodes(tmp_path / "list.json", LABELS)
    for nowhere in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match=r"nowhere.*no such file or folder; check the path"):
            load_episodes(nowhere, LABELS)


def test_a_repository_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'someone/nowhere'.*nor could such a dataset be read from the Hub"):
        load_episodes("someone/nowhere", LABELS)


def test_a_list_of_another_dataset_is_refused(episodes, tmp_path):
    other = LABELS + [0]  # all rows of the list still fit
    with pytest.raises(ValueError, match=rf"another dataset: its labels \({len(LABELS)} videos\)"):
        check_episodes(episodes, other)
    more = sample_episodes(LABELS + [0], way=3, num_episodes=2)
    with pytest.raises(ValueError, match=rf"another dataset: its labels \({len(other)} videos\)"):
        check_episodes(concatenate_datasets([episodes, more]), LABELS)
    episodes.to_parquet(tmp_path / "list.parquet")
    load_episodes(tmp_path / "list.parquet", other)
    # Without the fingerprint another order of rows still shows in the classes.
    with pytest.raises(ValueError, match="made for another dataset, split or order of rows"):
        load_episodes(tmp_path / "list.parquet", LABELS[::-1])


def own_list(**changes):
    """Two sound episodes of a user's own, with 2 and 3 ways and unequal shots and queries; `changes` to the second."""
    first = {"support": [0, 1], "support_labels": [1, 0], "query": [8], "query_labels": [0]}
    second = {
        "support": [4, 11, 18, 5, 2, 6],
        "support_labels": [2, 2, 2, 1, 0, 3],
        "query": [9, 25, 12],
        "query_labels": [0, 2, 1],
    }
    return Dataset.from_list(
        [first, second | changes], features=Features({name: List(Value("int64")) for name in COLUMNS})
    )


def test_lists_of_ones_own_are_accepted():
    check_episodes(own_list(), LABELS)
    extended = own_list().add_column("comment", ["first", "second"]).with_format("torch")
    check_episodes(extended, LABELS)
    extended.info.description = "My own list.\n\n{not json}\n\n7"
    check_episodes(extended, LABELS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"support": [4, 11, 18, 5, 2, len(LABELS)]}, f"support row {len(LABELS)} in episode 1 is out of range"),
        ({"query": [9, -1, 12]}, "query row -1 in episode 1 is out of range"),
        ({"query": [9, 11, 12]}, "row 11 occurs twice in episode 1"),
        ({"support": [4, 11, 4, 5, 2, 6]}, "row 4 occurs twice in episode 1"),
        ({"support_labels": [2, 2, 2, 1, 0, 4]}, r"support labels of episode 1 are \[0, 1, 2, 4\]"),
        ({"support_labels": [3, 3, 3, 2, 1, 4]}, r"support labels of episode 1 are \[1, 2, 3, 4\]"),
        ({"support_labels": [2, 2, 2, 1, 0, -1]}, r"support labels of episode 1 are \[-1, 0, 1, 2\]"),
        ({"support_labels": [2, 2, 2, 1, 0, 2**63 - 1]}, "support labels of episode 1 are"),
        ({"support_labels": [0] * 6}, r"support labels of episode 1 are \[0\]: .* at least 2"),
        ({"query_labels": [0, 2, 4]}, r"query label 4 in episode 1 has no support: .* \[0, 1, 2, 3\]"),
        ({"query_labels": [0, 2, -1]}, "query label -1 in episode 1 has no support"),
        ({"query_labels": [0, 2]}, "episode 1 has 3 query videos but 2 query_labels"),
        ({"support": [4, 11]}, "episode 1 has 2 support videos but 6 support_labels"),
        ({"query": [], "query_labels": []}, "episode 1 has no query videos"),
        ({"support": [], "support_labels": []}, "episode 1 has no support videos"),
        ({"query": [9, 25, 29]}, r"rows 5 and 29 share label 1 of episode 1, but .* classes 4 and 7"),
        ({"support": [4, 11, 18, 5, 2, None]}, r"column support .*\(null\)"),
        ({"query": None}, r"column query .*\(null\)"),
    ],
)
def test_broken_lists(changes, message):
    with pytest.raises(ValueError, match=message):
        check_episodes(own_list(**changes), LABELS)


@pytest.mark.slow
def test_one_class_under_two_labels_is_refused():
    episode = {"support": [0, 1, 7], "support_labels": [0, 1, 2], "query": [8], "query_labels": [1]}
    assert [LABELS[row] for row in (0, 1, 7, 8)] == [3, 0, 3, 0]
    with pytest.raises(ValueError, match=r"rows 0 and 7 have labels 0 and 2 in episode 0, but .* both in class 3"):
        check_episodes(Dataset.from_list([episode]), LABELS)


@pytest.mark.slow
def test_columns_of_other_kinds():
    with pytest.raises(ValueError, match=r"lacks the column\(s\) query_labels; it has support, support_labels, query"):
        check_episodes(own_list().remove_columns("query_labels"), LABELS)
    with pytest.raises(ValueError, match="column query of the episode list must hold lists of integers, got int64"):
        check_episodes(own_list().remove_columns("query").add_column("query", [8, 9]), LABELS)
    with pytest.raises(ValueError, match="got DatasetDict: choose one of its splits test"):
        check_episodes(DatasetDict(test=own_list()), LABELS)
    with pytest.raises(ValueError, match="the episode list is empty"):
        check_episodes(own_list().select([]), LABELS)


@pytest.mark.slow
def test_the_check_finds_what_a_clip_by_clip_check_finds():
    rng = np.random.default_rng(0)
    labels = [0, 1, 2, 0, 1, 2]
    verdicts = []
    for _ in range(300):
        rows = rng.permutation(6)
        episode_labels = rng.permutation(3)[np.array(labels)[rows]]
        rows[rng.integers(6)] += rng.choice([0, 0, 1])
        episode_labels[rng.integers(6)] += rng.choice([0, 0, 1])
        cut = int(rng.integers(3, 6))
        episode = {
            "support": rows[:cut].tolist(),
            "support_labels": episode_labels[:cut].tolist(),
            "query": rows[cut:].tolist(),
            "query_labels": episode_labels[cut:].tolist(),
        }
        verdicts.append(plain_faults(episode, labels))
        sound = {"support": [0, 1], "support_labels": [0, 1], "query": [3], "query_labels": [0]}
        listed = Dataset.from_list([sound, episode, sound])
        if verdicts[-1]:
            with pytest.raises(ValueError, match=r"episode 1\b"):
                check_episodes(listed, labels)
        else:
            check_episodes(listed, labels)
    assert 50 < sum(verdicts) < 250


def test_the_id_names_the_contents_and_nothing_else(episodes):
    name = episodes_id(episodes)
    assert (
        episodes_id(episodes.cast(Features({c: List(Value("int32")) for c in COLUMNS})).with_format("numpy")) == name
    )
    assert episodes_id(episodes.select_columns(COLUMNS[::-1]).add_column("comment", ["x"] * 12)) == name
    fixed = {c: List(Value("int64"), length=len(episodes[0][c])) for c in COLUMNS}
    assert episodes_id(episodes.cast(Features(fixed))) == name
    assert episodes_id(concatenate_datasets([episodes.select(range(5)), episodes.select(range(5, 12))])) == name
    assert episodes_id(episodes.select([1, 0, *range(2, 12)])) != name
    assert episodes_id(episodes.select(range(11))) != name
    # The same numbers, cut into episodes elsewhere.
    assert episodes_id(Dataset.from_dict({c: [[0, 1], [2]] for c in COLUMNS})) != episodes_id(
        Dataset.from_dict({c: [[0], [1, 2]] for c in COLUMNS})
    )


def test_a_list_is_read_some_episodes_at_a_time(monkeypatch):
    drawn = sample_episodes(LABELS, 5, 2, 2, num_episodes=100, seed=42)
    whole = episodes_module.rows_of(drawn), episodes_module.sizes_of(drawn)
    monkeypatch.setattr(episodes_module, "_EPISODES_A_READ", 7)
    check_episodes(drawn, LABELS)
    assert episodes_id(drawn) == "a04c8035f02f846f"
    assert np.array_equal(episodes_module.rows_of(drawn), whole[0])
    assert np.array_equal(episodes_module.sizes_of(drawn), whole[1]) and whole[1].tolist() == [[5, 10, 10]] * 100
    rows = [dict(episode) for episode in drawn]
    rows[9]["query"] = rows[9]["query"][:-1]
    with pytest.raises(ValueError, match="episode 9 has 9 query videos but 10 query_labels"):
        check_episodes(Dataset.from_list(rows), LABELS)
    rows[9] = {**drawn[9], "support": [drawn[9]["support"][1], *drawn[9]["support"][1:]]}
    with pytest.raises(ValueError, match=r"occurs twice in episode 9"):
        check_episodes(Dataset.from_list(rows), LABELS)
    rows[9] = {**drawn[9], "support_labels": [0] * 10}
    with pytest.raises(ValueError, match=r"support labels of episode 9 are \[0\]"):
        check_episodes(Dataset.from_list(rows), LABELS)
