import hashlib
import os
import random
import stat
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from dmgal_hf.data import splits
from dmgal_hf.data.splits import (
    BENCHMARKS,
    check_splits_are_disjoint,
    clip_stem,
    draw_class_split,
    fetch_split_lists,
    fetch_verified_file,
    parse_split_list,
    read_split_lists,
)

# The authors' lists are not ours to ship; where a copy lies beside the checkout, the tests read it.
AUTHORS_LISTS = Path(__file__).resolve().parents[3] / "shared" / "splits"
needs_authors_lists = pytest.mark.skipif(not AUTHORS_LISTS.is_dir(), reason="no copy of the authors' lists")

# classes and videos of train, validation and test, from the table of the benchmarks
COUNTS = {
    "ssv2-full": ((64, 12, 24), (67013, 1926, 2857)),
    "ssv2-small": ((64, 12, 24), (6400, 1200, 2400)),
    "kinetics-100": ((64, 12, 24), (6400, 1200, 2400)),
    "hmdb51": ((31, 10, 10), (4280, 1194, 1292)),
    "ucf101": ((70, 10, 21), (9154, 1421, 2745)),
}


@pytest.fixture
def served(tmp_path):
    """A real HTTP server on a folder: (folder, base address, list of the paths it was asked for)."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_lists(folder, train="a/1\na/2\n", val="b/3\nb/4\n", test="c/5\nc/6\n"):
    for name, text in (("trainlist03", train), ("vallist03", val), ("testlist03", test)):
        write(folder / f"{name}.txt", text)
    return folder


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# ---- one list


def test_class_names_keep_spaces_brackets_and_commas_and_ids_lose_only_suffixes(tmp_path):
    path = write(
        tmp_path / "list.txt",
        "hurling (sport)/lISBulMckk0_000694_000704\n"
        "Piling something, something and something up/7.webm  \n"
        "\n"
        "   \n"
        "train8/78687\r\n"
        " v.1/a.b_c.d.AVI\n"
        "archive/clip.zip\n"
        "note/name.txt",
    )
    assert parse_split_list(path) == [
        ("hurling (sport)", "lISBulMckk0_000694_000704"),
        ("Piling something, something and something up", "7"),
        ("train8", "78687"),
        ("v.1", "a.b_c.d"),
        ("archive", "clip"),
        ("note", "name.txt"),
    ]


def test_byte_order_mark_is_no_part_of_a_class(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffrun/1\nGewürz/ö_2\n".encode())
    assert parse_split_list(path) == [("run", "1"), ("Gewürz", "ö_2")]


def test_the_folder_names_the_class_where_each_label_has_its_own(tmp_path):
    text = "test0//videos/fencing/a b!_1.avi\ntest1//videos/ride_bike/x.avi\ntest0//other/fencing/c.mp4\n"
    assert parse_split_list(write(tmp_path / "list.txt", text)) == [
        ("fencing", "a b!_1"),
        ("ride_bike", "x"),
        ("fencing", "c"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "test0//clips/1.webm\ntest1//clips/2.webm\n",  # one folder deep: it holds everything
        "test0//data/clips/1.webm\ntest1//data/clips/2.webm\n",  # two deep, but shared by the labels
        "test0//data/a/1.webm\ntest1//data/b/2.webm\ntest1//data/c/3.webm\n",  # a label with two folders
        "test0//data/a/1.webm\ntest1//2.webm\n",  # not the same form throughout
    ],
)
def test_the_label_stays_the_class_where_folders_are_no_classes(tmp_path, text):
    assert {class_name for class_name, _ in parse_split_list(write(tmp_path / "list.txt", text))} == {"test0", "test1"}


def test_a_single_class_is_named_by_its_folder(tmp_path):
    path = write(tmp_path / "list.txt", "test0//videos/fencing/name.avi\n")
    assert parse_split_list(path) == [("fencing", "name")]


@pytest.mark.parametrize(
    "text",
    [
        "run/a b 405 0\nwalk/c 3 1\n",
        "run/a b.avi 3\n\nwalk/c.avi 14\n",
        "run/a b,405,0\nwalk/c, 3, 1",
        "run/a b\t405\nwalk/c\t3\n",
        "run//videos/a b.avi 0\nwalk//videos/c.avi 1\n",
    ],
)
def test_counts_behind_the_ids_are_left_out(tmp_path, text):
    assert parse_split_list(write(tmp_path / "list.txt", text)) == [("run", "a b"), ("walk", "c")]


@pytest.mark.parametrize("text", ["fencing/bout 1\nfencing/bout 2\n", "run/take 1 2\nrun/last\n"])
def test_numbers_that_may_belong_to_the_id_stay(tmp_path, text):
    ids = [line.partition("/")[2] for line in text.splitlines()]
    assert [video_id for _, video_id in parse_split_list(write(tmp_path / "list.txt", text))] == ids


def test_counts_on_some_lines_alone_are_refused_at_the_line(tmp_path):
    path = write(tmp_path / "list.txt", "run/a.avi\nrun/b.avi 3\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: 'run/b\.avi 3' has numbers .* line 1 has none"):
        parse_split_list(path)


@pytest.mark.parametrize(
    "line", ["no slash", "/id", "class/", "a/b/c", "a///b", "test0//", "a/b//c", "test0//x//y.avi"]
)
def test_a_line_that_does_not_parse_is_named_by_file_and_number(tmp_path, line):
    path = write(tmp_path / "odd.txt", f"run/1\n\n{line}\nrun/2\n")
    with pytest.raises(ValueError) as error:
        parse_split_list(path)
    assert f"{path}, line 3" in str(error.value) and repr(line) in str(error.value)


def test_a_repeated_id_is_named_with_both_lines(tmp_path):
    path = write(tmp_path / "list.txt", "run/1\nrun/2\n\nwalk/1.avi\n")
    with pytest.raises(ValueError, match=r"lines 1 and 4: the video id '1' occurs twice"):
        parse_split_list(path)


def test_lists_that_are_absent_empty_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        parse_split_list(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"empty\.txt lists no video"):
        parse_split_list(write(tmp_path / "empty.txt", "\n  \n"))
    (tmp_path / "binary.txt").write_bytes(b"run/\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.txt is not a UTF-8"):
        parse_split_list(tmp_path / "binary.txt")


def test_clip_stem():
    assert clip_stem("a.b.WebM") == "a.b"
    assert clip_stem("v_x_g01_c01") == "v_x_g01_c01"
    assert clip_stem("Mr. Smith_1") == "Mr. Smith_1"
    assert clip_stem(".mp4") == ".mp4"


# ---- the three lists of a benchmark


@pytest.mark.parametrize("place", ["", "hmdb_ARN"])
def test_lists_lie_in_the_folder_or_in_the_authors_sub_folder(tmp_path, place):
    write_lists(tmp_path / place)
    lists = read_split_lists(tmp_path, "hmdb51")
    assert lists == {
        "train": [("a", "1"), ("a", "2")],
        "validation": [("b", "3"), ("b", "4")],
        "test": [("c", "5"), ("c", "6")],
    }
    assert list(lists) == ["train", "validation", "test"]


def test_missing_or_double_lists_and_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_split_lists(tmp_path / "nowhere", "hmdb51")
    write_lists(tmp_path)
    with pytest.raises(ValueError, match=r"'hmdb-51'.*hmdb51"):
        read_split_lists(tmp_path, "hmdb-51")
    (tmp_path / "vallist03.txt").rename(tmp_path / "validation_few_shot.txt")
    assert read_split_lists(tmp_path, "ucf101")["validation"] == [("b", "3"), ("b", "4")]
    write(tmp_path / "testlist07.txt", "d/7\n")
    with pytest.raises(ValueError, match=r"Two test lists.*testlist03\.txt and testlist07\.txt"):
        read_split_lists(tmp_path, "hmdb51")
    for path in tmp_path.glob("test*.txt"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="No test list for hmdb51"):
        read_split_lists(tmp_path, "hmdb51")


def test_the_lists_of_another_benchmark_are_refused(tmp_path):
    # Both SSv2 benchmarks draw on the same videos: the mistake would go unnoticed.
    folder = write_lists(tmp_path / "ssv2_CMN")
    with pytest.raises(ValueError, match="ssv2-small, not of ssv2-full"):
        read_split_lists(folder, "ssv2-full")


def test_a_class_or_a_video_in_two_splits_is_named_with_both_files(tmp_path):
    write_lists(tmp_path / "class", train="run fast/1\n", test="Run_Fast/5\n")
    with pytest.raises(
        ValueError, match=r"class 'Run_Fast' is in two splits, .*trainlist03\.txt and .*testlist03\.txt"
    ):
        read_split_lists(tmp_path / "class", "hmdb51")
    write_lists(tmp_path / "video", val="b/3\nb/2.avi\n")
    with pytest.raises(ValueError, match=r"video '2' is in two splits, .*trainlist03\.txt and .*vallist03\.txt"):
        read_split_lists(tmp_path / "video", "hmdb51")


def test_classes_that_only_look_alike_may_stand_in_two_splits():
    check_splits_are_disjoint({"train": [("C++", "1")], "test": [("C#", "2"), ("c", "3")]})


# ---- fetching


def test_a_file_is_fetched_whole_or_not_at_all(served, tmp_path):
    folder, address, _ = served
    content = b"run/1\nwalk (fast)/2\n"
    (folder / "list.txt").write_bytes(content)
    target = tmp_path / "cache" / "deep" / "list.txt"
    with pytest.raises(ValueError) as error:
        fetch_verified_file(f"{address}/list.txt", target, "0" * 64)
    for part in ("deep/list.txt", "0" * 64, sha256(content)):
        assert part in str(error.value)
    assert not list(tmp_path.rglob("cache/**/*.txt*"))

    fetch_verified_file(f"{address}/list.txt", target, sha256(content))
    assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["list.txt"]
    if os.name == "posix":
        assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_unreachable_lists_say_where_they_should_have_been(served, tmp_path, monkeypatch):
    _, address, asked = served
    with pytest.raises(ConnectionError, match=r"/hmdb_ARN/trainlist03\.txt.*404.*splits="):
        fetch_split_lists("hmdb51", tmp_path, address)
    assert len(asked) > 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked.clear()
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        fetch_split_lists("hmdb51", tmp_path, address)
    assert asked == []


def test_a_changed_list_is_refused_by_its_sum(served, tmp_path):
    folder, address, _ = served
    write(folder / "ssv2_OTAM" / "trainlist07.txt", "train8/1\n")
    with pytest.raises(ValueError) as error:
        fetch_split_lists("ssv2-full", tmp_path / "cache", address)
    expected = "886fdd2b9215328efaee7e73ae2ea8f5b3e99fd3732679481652bad1506df5c0"
    for part in ("ssv2_OTAM/trainlist07.txt", expected, sha256(b"train8/1\n")):
        assert part in str(error.value)
    assert not (tmp_path / "cache" / "ssv2_OTAM" / "trainlist07.txt").exists()


@pytest.mark.slow
@needs_authors_lists
@pytest.mark.parametrize("name", COUNTS)
def test_the_authors_lists_are_fetched_once_and_complete(served, tmp_path, monkeypatch, name):
    folder, address, asked = served
    (folder / "splits").symlink_to(AUTHORS_LISTS)
    monkeypatch.setattr(splits, "SPLITS_BASE_URL", f"{address}/splits")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    cached = fetch_split_lists(name)
    assert cached.is_relative_to(tmp_path / "home" / "dmgal_hf" / "splits")
    assert len(asked) == 3 and fetch_split_lists(name) == cached and len(asked) == 3

    damaged = next(cached.glob("val*.txt"))
    damaged.write_text("cut off")
    fetch_split_lists(name)
    assert len(asked) == 4 and damaged.name in asked[-1]

    lists = read_split_lists(cached, name)
    assert lists == read_split_lists(AUTHORS_LISTS, name)
    class_counts, video_counts = COUNTS[name]
    assert tuple(len({class_name for class_name, _ in entries}) for entries in lists.values()) == class_counts
    assert tuple(map(len, lists.values())) == video_counts


def test_every_list_has_its_own_sum():
    sums = [sha256 for lists in BENCHMARKS.values() for _, sha256 in lists.files.values()]
    assert len(set(sums)) == 15 and all(len(bytes.fromhex(value)) == 32 for value in sums)


# ---- drawing


def test_a_draw_depends_on_the_set_of_classes_and_the_seed_alone():
    names = [f"class {index}" for index in range(100)]
    drawn = draw_class_split(names, seed=3)
    assert {split: len(classes) for split, classes in drawn.items()} == {"train": 64, "validation": 12, "test": 24}
    assert sorted(name for classes in drawn.values() for name in classes) == sorted(names)
    random.Random(0).shuffle(names)
    assert draw_class_split(names + names[:5], seed=3) == drawn
    assert draw_class_split(names, seed=4) != drawn


def test_a_draw_is_the_same_on_every_machine():
    # Fixed once: changing the draw would change everybody's splits.
    drawn = draw_class_split(["jump", "run", "sit", "walk", "wave"], seed=0)
    assert drawn == {"train": ["jump", "walk", "wave"], "validation": ["run"], "test": ["sit"]}


@pytest.mark.parametrize("number", range(3, 40))
def test_every_split_gets_a_class_and_about_its_share(number):
    fractions = (0.64, 0.12, 0.24)
    drawn = draw_class_split([str(index) for index in range(number)], fractions=fractions)
    counts = [len(drawn[split]) for split in ("train", "validation", "test")]
    assert sum(counts) == number and min(counts) >= 1
    assert all(abs(count - number * share) <= 1.5 for count, share in zip(counts, fractions, strict=True))


def test_a_share_of_zero_leaves_the_split_out():
    drawn = draw_class_split("abcd", fractions=(0.5, 0, 0.5))
    assert {split: len(classes) for split, classes in drawn.items()} == {"train": 2, "test": 2}


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions"):
        draw_class_split("abcdefgh", fractions=fractions)


def test_too_few_classes_to_divide():
    with pytest.raises(ValueError, match="2 classes cannot be divided over train, validation, test"):
        draw_class_split(["run", "walk"])
