import hashlib
import json
import os
import random
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, Video
from huggingface_hub import constants

from dmgal_hf.data import splits as splits_module
from dmgal_hf.data.benchmarks import find_videos, list_class_clips, load_benchmark, load_video_folder, scan_videos
from dmgal_hf.data.preparation import describe_source
from dmgal_hf.data.splits import BENCHMARKS, read_split_lists
from dmgal_hf.training.arguments import DataArguments, parse_arguments
from dmgal_hf.training.loading import load_videos

# The authors' lists are not ours to ship; where a copy lies beside the checkout, the tests read it.
AUTHORS_LISTS = Path(__file__).resolve().parents[3] / "shared" / "splits"

# Two classes a split, two clips a class.
ANONYMOUS = {
    "train": "train8/78687\ntrain5/3\ntrain8/12\ntrain5/40\n",
    "val": "val0/5\nval0/6\nval1/7\nval1/8\n",
    "test": "test0/9\ntest0/10\ntest1/11\ntest1/13\n",
}
KINETICS = {
    "train": "hurling (sport)/lISB-lM_k_0_000694_000704\nhurling (sport)/AAAAAAAAAAA_000001_000011\n",
    "val": "side kick/__a-b_c_d_1_000000_000010\nside kick/-BBBBBBBBB-_000100_000110\n",
    "test": "air drumming/aaaaaaaaaaa_000001_000011\nair drumming/CCCCCCCC_12_000003_000013\n",
}
UCF = {
    "train": "HandstandPushups/v_HandStandPushups_g01_c01\nHandstandPushups/v_HandStandPushups_g01_c02\n",
    "val": "YoYo/v_YoYo_g01_c01\nYoYo/v_YoYo_g01_c02\n",
    "test": "Punch/v_Punch_g01_c01\nPunch/v_Punch_g01_c02\n",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_lists(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, text in texts.items():
        (folder / f"{prefix}list.txt").write_text(text, encoding="utf-8")
    return folder


def touch(root, *names):
    """Empty files: nothing may open them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def touch_listed(root, texts, name_of):
    for text in texts.values():
        for line in text.splitlines():
            touch(root, name_of(*line.split("/")))
    return root


def relative_paths(dataset, root):
    return [Path(video["path"]).relative_to(root).as_posix() for video in dataset["video"]]


def paths_by_id(datasets, root):
    return {
        video_id: path
        for dataset in datasets.values()
        for video_id, path in zip(dataset["video_id"], relative_paths(dataset, root), strict=True)
    }


@pytest.fixture
def ssv2(tmp_path):
    """(folder of videos, folder of lists) of a complete SSv2-Full of twelve clips."""
    videos = touch_listed(tmp_path / "videos", ANONYMOUS, lambda _, video_id: f"{video_id}.webm")
    return videos, write_lists(tmp_path / "lists", ANONYMOUS)


# ---- the datasets


def test_columns_features_and_order(ssv2, monkeypatch):
    videos, lists = ssv2
    touch(videos, "4.webm", "78688.webm")  # in the data set, in no list
    datasets = load_benchmark("ssv2-full", videos, splits=lists)
    assert isinstance(datasets, DatasetDict) and list(datasets) == ["train", "validation", "test"]
    names = ["train8", "train5", "val0", "val1", "test0", "test1"]
    for dataset in datasets.values():
        assert set(dataset.column_names) == {"video", "label", "video_id"}
        assert isinstance(dataset.features["video"], Video) and not dataset.features["video"].decode
        assert dataset.features["label"] == ClassLabel(names=names)
        assert dataset.features == datasets["train"].features
    assert datasets["train"]["video_id"][:] == ["78687", "3", "12", "40"]
    assert datasets["train"]["label"][:] == [0, 1, 0, 1]
    assert datasets["test"]["label"][:] == [4, 4, 5, 5]
    assert datasets["train"][0]["video"] == {"bytes": None, "path": str(videos / "78687.webm")}

    monkeypatch.chdir(videos.parent)  # a relative folder gives the same rows, wherever they are read later
    assert load_benchmark("ssv2-full", "videos", splits="lists")["test"][:] == datasets["test"][:]


@pytest.mark.parametrize(
    "name_of",
    [
        lambda class_name, video_id: f"{class_name}/{video_id}.mp4",
        lambda class_name, video_id: f"train_256/{class_name.replace(' ', '_')}/{video_id}.mkv",
        lambda class_name, video_id: f"{class_name}/{video_id[:11]}.mp4",
        lambda class_name, video_id: f"{video_id[:11]}_{int(video_id[12:18])}_{int(video_id[19:])}.mp4",
        lambda class_name, video_id: f"{class_name}/{video_id}/img_00001.jpg",
        lambda class_name, video_id: f"{class_name}/{video_id}.zip",
    ],
    ids=["published", "underscores", "bare ids", "short times, flat", "frames", "zips"],
)
def test_kinetics_layouts(tmp_path, name_of):
    videos = touch_listed(tmp_path / "videos", KINETICS, name_of)
    datasets = load_benchmark("kinetics-100", videos, splits=write_lists(tmp_path / "lists", KINETICS))
    found = paths_by_id(datasets, videos)
    for text in KINETICS.values():
        for class_name, video_id in (line.split("/") for line in text.splitlines()):
            expected = name_of(class_name, video_id).removesuffix("/img_00001.jpg")
            assert found[video_id] == expected
    assert datasets["test"].features["label"].names == ["hurling (sport)", "side kick", "air drumming"]


def test_segments_of_one_youtube_video_are_told_apart(tmp_path):
    texts = {
        "train": "run/AAAA_11_222_000001_000011\nrun/AAAA_11_222_000050_000060\n",
        "val": "walk/aaaa_11_222_000001_000011\nwalk/BBBBBBBBBBB\n",  # another id by case alone; no times in the list
        "test": "jump/CCCCCCCCCCC_000001_000011\njump/DDDDDDDDDDD_000001_000011\n",
    }
    videos = touch(
        tmp_path / "videos",
        *("AAAA_11_222_000001_000011.mp4", "AAAA_11_222_000050_000060.mp4", "aaaa_11_222.mp4"),
        *("BBBBBBBBBBB_000007_000017.mp4", "CCCCCCCCCCC_000001_000011.mp4", "CCCCCCCCCCC.mp4"),
        "DDDDDDDDDDD_000002_000012.mp4",  # one second later: not the listed clip
    )
    lists = read_split_lists(write_lists(tmp_path / "lists", texts), "kinetics-100")
    found = {video_id: os.path.basename(path) for video_id, path in find_videos(lists, videos, True).items()}
    assert found == {
        "AAAA_11_222_000001_000011": "AAAA_11_222_000001_000011.mp4",
        "AAAA_11_222_000050_000060": "AAAA_11_222_000050_000060.mp4",
        "aaaa_11_222_000001_000011": "aaaa_11_222.mp4",
        "BBBBBBBBBBB": "BBBBBBBBBBB_000007_000017.mp4",
        "CCCCCCCCCCC_000001_000011": "CCCCCCCCCCC_000001_000011.mp4",
    }


def test_one_file_cannot_be_two_listed_videos(tmp_path):
    texts = KINETICS | {"train": "run/AAAAAAAAAAA_000001_000011\nrun/AAAAAAAAAAA_000050_000060\n"}
    videos = touch_listed(tmp_path / "videos", texts, lambda _, video_id: f"{video_id[:11]}.mp4")
    with pytest.raises(
        ValueError, match=r"AAAAAAAAAAA\.mp4 .*'AAAAAAAAAAA_000001_000011' and 'AAAAAAAAAAA_000050_000060'"
    ):
        load_benchmark("kinetics-100", videos, splits=write_lists(tmp_path / "lists", texts))


def test_ucf101_as_unpacked_whatever_the_case(tmp_path):
    lists = write_lists(tmp_path / "lists", UCF)
    videos = touch_listed(tmp_path / "videos", UCF, lambda class_name, name: f"UCF-101/{class_name}/{name}.avi")
    archive = load_benchmark("ucf101", videos, splits=lists)
    assert relative_paths(archive["train"], videos)[0] == "UCF-101/HandstandPushups/v_HandStandPushups_g01_c01.avi"

    other = {
        prefix: "".join(
            f"{prefix}0//videos/{class_name}/{name.replace('Stand', 'stand')}.avi\n"
            for class_name, name in (line.split("/") for line in text.splitlines())
        )
        for prefix, text in UCF.items()
    }
    again = load_benchmark("ucf101", videos, splits=write_lists(tmp_path / "other", other))
    for split, dataset in archive.items():
        assert again[split]["video"][:] == dataset["video"][:]
        assert again[split].features["label"] == dataset.features["label"]


def test_hmdb51_names_with_odd_characters(tmp_path):
    names = ["(Rad)Schlag_die_Bank!_cartwheel_f", "#20_Rhythm_clap", "a;b[1]~&+@_clap", "veoh.1_clap"]
    texts = {
        "train": f"cartwheel/{names[0]}\n",
        "val": f"clap/{names[1]}\nclap/{names[2]}\n",
        "test": f"smile/{names[3]}\n",
    }
    videos = touch_listed(tmp_path / "videos", texts, lambda class_name, name: f"hmdb51_org/{class_name}/{name}.avi")
    datasets = load_benchmark("hmdb51", videos, splits=write_lists(tmp_path / "lists", texts))
    assert sorted(paths_by_id(datasets, videos)) == sorted(names)


def test_of_two_files_the_one_in_the_class_folder_is_taken(tmp_path):
    lists = write_lists(tmp_path / "lists", UCF)
    videos = touch_listed(tmp_path / "videos", UCF, lambda class_name, name: f"{class_name}/{name}.avi")
    touch(videos, "backup/v_YoYo_g01_c01.avi")
    datasets = load_benchmark("ucf101", videos, splits=lists)
    assert relative_paths(datasets["validation"], videos) == ["YoYo/v_YoYo_g01_c01.avi", "YoYo/v_YoYo_g01_c02.avi"]

    touch(videos, "cache/yo_yo/v_YoYo_g01_c01.mp4")  # a class folder by another spelling
    with pytest.raises(
        ValueError, match=r"'v_YoYo_g01_c01' of class 'YoYo': .*YoYo/v_YoYo_g01_c01\.avi and .*yo_yo/v_YoYo"
    ):
        load_benchmark("ucf101", videos, splits=lists)


def test_two_files_outside_any_class_folder_are_both_named(ssv2):
    videos, lists = ssv2
    touch(videos, "old/78687.mp4")
    with pytest.raises(ValueError) as error:
        load_benchmark("ssv2-full", videos, splits=lists)
    assert str(videos / "78687.webm") in str(error.value) and str(videos / "old" / "78687.mp4") in str(error.value)


def test_the_search_agrees_with_trying_every_file_for_every_video(tmp_path):
    rng = random.Random(7)
    videos = tmp_path / "videos"
    for _ in range(500):
        stem = f"v_{rng.randrange(400)}"
        suffix = rng.choice([".avi", ".MP4", ".zip", ".txt", "_", "/0001.jpg", "/0001.txt"])
        touch(videos, f"{rng.choice(['', 'a/', 'b/', 'a/b/', '.hidden/'])}{stem}{suffix}")
    wanted = [(rng.choice("ab"), f"V_{index}") for index in range(400)]

    clips = set()
    for folder, _, files in os.walk(videos):
        if any(part.startswith(".") for part in Path(folder).relative_to(videos).parts):
            continue
        clips |= {Path(folder, name) for name in files if name.lower().endswith((".avi", ".mp4", ".zip"))}
        if "0001.jpg" in files:  # beside a text file or alone
            clips.add(Path(folder))
    expected, ambiguous = {}, set()
    for class_name, video_id in wanted:
        matches = [path for path in clips if path.name.split(".")[0].lower() == video_id.lower()]
        if len(matches) > 1:
            matches = [path for path in matches if path.parent.name == class_name]
            if len(matches) != 1:
                ambiguous.add(video_id)
                continue
        if matches:
            expected[video_id] = str(matches[0])
    assert len(expected) > 100 and len(ambiguous) > 10

    clear = [entry for entry in wanted if entry[1] not in ambiguous]
    assert find_videos({"train": clear[:50], "test": clear[50:]}, videos) == expected
    for video_id in sorted(ambiguous)[:5]:
        with pytest.raises(ValueError, match=f"'{video_id}'"):
            find_videos({"train": [entry for entry in wanted if entry[1] == video_id]}, videos)


# ---- missing videos


def test_missing_videos_are_counted_by_class_and_refused(ssv2):
    videos, lists = ssv2
    for video_id in ("78687", "9", "10"):
        (videos / f"{video_id}.webm").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_benchmark("ssv2-full", videos, splits=lists)
    message = str(error.value)
    assert "3 of 12 videos of ssv2-full are missing" in message and str(videos) in message
    assert "test0: 2 of 2 ('9', '10')" in message and "train8: 1 of 2 ('78687')" in message
    assert "allow_missing=True" in message


def test_long_reports_are_cut_and_still_count(tmp_path):
    texts = {
        "train": "".join(f"train{index // 20}/{index}\n" for index in range(300)),
        "val": "val0/1000\n",
        "test": "test0/2000\n",
    }
    videos = touch(tmp_path / "videos", "1000.webm", "2000.webm")
    with pytest.raises(FileNotFoundError) as error:
        load_benchmark("ssv2-full", videos, splits=write_lists(tmp_path / "lists", texts))
    assert "300 of 302" in str(error.value) and "and 100 in 5 more classes" in str(error.value)
    assert len(str(error.value).splitlines()) < 15


def test_allow_missing_goes_on_with_the_rest_and_warns(ssv2, caplog):
    videos, lists = ssv2
    (videos / "78687.webm").unlink()
    (videos / "13.webm").unlink()
    datasets = load_benchmark("ssv2-full", videos, splits=lists, allow_missing=True, min_clips=1)
    names = datasets["train"].features["label"].names
    assert datasets["train"]["video_id"][:] == ["3", "12", "40"]
    assert datasets["train"]["label"][:] == [1, 0, 1]
    assert names == ["train8", "train5", "val0", "val1", "test0", "test1"]  # as with all videos
    assert datasets["test"]["video_id"][:] == ["9", "10", "11"]
    assert "2 of 12 videos" in caplog.text and "train8: 1 of 2" in caplog.text


def test_a_class_left_with_too_few_clips_is_named(ssv2):
    videos, lists = ssv2
    (videos / "13.webm").unlink()
    with pytest.raises(ValueError, match=r"min_clips=2 .*1 of 6 classes: 'test1' \(1\)"):
        load_benchmark("ssv2-full", videos, splits=lists, allow_missing=True)
    (videos / "11.webm").unlink()
    with pytest.raises(ValueError, match=r"'test1' \(0\)"):
        load_benchmark("ssv2-full", videos, splits=lists, allow_missing=True, min_clips=1)
    with pytest.raises(ValueError, match="min_clips must be at least 1"):
        load_benchmark("ssv2-full", videos, splits=lists, allow_missing=True, min_clips=0)


def test_folders_and_names_that_are_not_there(ssv2, tmp_path):
    videos, lists = ssv2
    with pytest.raises(ValueError, match=r"'ssv2'.*ssv2-full, ssv2-small, kinetics-100, hmdb51, ucf101"):
        load_benchmark("ssv2", videos, splits=lists)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_benchmark("ssv2-full", tmp_path / "absent", splits=lists)
    for name in ("frames.zip", "frames.tar"):
        with pytest.raises(NotADirectoryError, match=rf"{name} is a file and no readable zip archive.*unpack"):
            load_benchmark("ssv2-full", touch(tmp_path, name) / name, splits=lists)
    with zipfile.ZipFile(tmp_path / "videos.zip", "w"):
        pass
    with pytest.raises(FileNotFoundError, match=r"no folder 'absent' in the zip archive .*videos\.zip"):
        load_benchmark("ssv2-full", tmp_path / "videos.zip#" / "absent", splits=lists)
    (tmp_path / "videos.zip").rename(tmp_path / "videos.bin")
    with pytest.raises(NotADirectoryError, match=r"videos\.bin is a zip archive by another name"):
        load_benchmark("ssv2-full", tmp_path / "videos.bin", splits=lists)


# ---- names for the numbered classes of SSv2


def label_entries(texts, template_of):
    return [
        {"id": video_id, "label": f"text of {video_id}", "template": template_of(class_name)}
        for text in texts
        for class_name, video_id in (line.split("/") for line in text.splitlines())
    ]


@pytest.fixture
def label_files(tmp_path):
    """train.json names the train and validation classes, validation.json one clip of each test class."""
    train = label_entries([ANONYMOUS["train"], ANONYMOUS["val"]], lambda name: f"Doing {name} to [something], slowly")
    validation = label_entries(["test0/9\ntest1/13\n"], lambda name: f"Doing {name} to [something], slowly")
    paths = []
    for name, entries in (("train", train), ("validation", validation)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(entries), encoding="utf-8")
    return paths


def test_ssv2_classes_get_their_names(ssv2, label_files):
    videos, lists = ssv2
    plain = load_benchmark("ssv2-full", videos, splits=lists)
    named = load_benchmark("ssv2-full", videos, splits=lists, class_labels=label_files)
    assert named["test"].features["label"].names == [
        f"Doing {name} to something, slowly" for name in plain["test"].features["label"].names
    ]
    for split, dataset in plain.items():
        assert named[split]["label"][:] == dataset["label"][:]
        assert named[split]["video_id"][:] == dataset["video_id"][:]


def test_label_files_on_the_command_line(ssv2, label_files):
    videos, lists = ssv2
    options = ["--dataset", "ssv2-full", "--videos", videos, "--splits", lists, "--class_labels", *label_files]
    (arguments,) = parse_arguments((DataArguments,), [str(option) for option in options])
    assert load_videos(arguments)["test"].features["label"].names[0] == "Doing train8 to something, slowly"
    assert describe_source(arguments)["class_labels"] == [str(path) for path in label_files]


def test_numeric_ids_and_labels_without_templates(ssv2, tmp_path):
    videos, lists = ssv2
    entries = label_entries(ANONYMOUS.values(), lambda name: name)
    entries = [{"id": int(entry["id"]), "label": f"Moving {entry['template']}"} for entry in entries]
    path = tmp_path / "all.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    named = load_benchmark("ssv2-full", videos, splits=lists, class_labels=str(path))
    assert named["train"].features["label"].names[0] == "Moving train8"


def test_label_files_that_do_not_fit(ssv2, label_files, tmp_path):
    videos, lists = ssv2
    load = partial(load_benchmark, "ssv2-full", videos, splits=lists)
    with pytest.raises(ValueError, match="no video of 2 classes: test0, test1"):
        load(class_labels=label_files[0])

    def rewritten(change):
        entries = json.loads(label_files[0].read_text())
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(change(entries)), encoding="utf-8")
        return [path, label_files[1]]

    with pytest.raises(ValueError, match=r"class 'train8' disagree.*78687.*'Doing.*12 is 'Other'"):
        load(
            class_labels=rewritten(
                lambda entries: [e | {"template": "Other"} if e["id"] == "12" else e for e in entries]
            )
        )
    with pytest.raises(ValueError, match="'train8' and 'train5' have one name, 'Same'"):
        load(class_labels=rewritten(lambda entries: [e | {"template": "[Same]"} for e in entries]))
    with pytest.raises(ValueError, match=r"disagree on video 9: .*'Doing test0 to something, slowly'"):
        load(class_labels=rewritten(lambda entries: [*entries, {"id": "9", "template": "Other"}]))
    with pytest.raises(ValueError, match=r'Entry 1 of the label file .*changed\.json needs "id"'):
        load(class_labels=rewritten(lambda entries: [entries[0], {"id": "4"}]))
    with pytest.raises(ValueError, match=r"changed\.json is no list"):
        load(class_labels=rewritten(lambda entries: {"Doing something": "0"}))
    (tmp_path / "changed.json").write_text("[")
    with pytest.raises(ValueError, match=r"changed\.json is not JSON"):
        load(class_labels=tmp_path / "changed.json")


def test_other_benchmarks_have_no_label_files(tmp_path, label_files):
    videos = touch_listed(tmp_path / "videos", UCF, lambda class_name, name: f"{name}.avi")
    with pytest.raises(ValueError, match="class_labels are for Something-Something V2 alone"):
        load_benchmark("ucf101", videos, splits=write_lists(tmp_path / "lists", UCF), class_labels=label_files)


# ---- the authors' lists


@pytest.mark.skipif(not AUTHORS_LISTS.is_dir(), reason="no copy of the authors' lists")
def test_a_benchmark_from_fetched_lists(tmp_path, monkeypatch):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    lists = read_split_lists(AUTHORS_LISTS, "hmdb51")
    kept = {split: [] for split in lists}  # two clips a class: thousands of files would take their time
    for split, entries in lists.items():
        for entry in entries:
            if sum(other[0] == entry[0] for other in kept[split]) < 2:
                kept[split].append(entry)
        touch(tmp_path / "videos", *(f"{class_name}/{name}.avi" for class_name, name in kept[split]))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(AUTHORS_LISTS))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(splits_module, "SPLITS_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        datasets = load_benchmark("hmdb51", tmp_path / "videos", allow_missing=True)
        server.shutdown()
    assert [dataset.num_rows for dataset in datasets.values()] == [62, 20, 20]
    assert len(datasets["test"].features["label"].names) == 51
    for split, entries in kept.items():
        names = datasets[split].features["label"].int2str(datasets[split]["label"][:])
        assert list(zip(names, datasets[split]["video_id"][:], strict=True)) == entries
    fetched = next((tmp_path / "home").rglob("testlist03.txt")).read_bytes()
    assert hashlib.sha256(fetched).hexdigest() == BENCHMARKS["hmdb51"].files["test"][1]


# ---- a folder without lists


def test_given_splits_any_of_them(tmp_path):
    touch(
        tmp_path, "val/sit/2.mp4", "val/sit/1.mp4", "train/run fast/b.webm", "train/jump/a.gif", "train/jump/x/c.mkv"
    )
    touch(tmp_path, ".DS_Store", "train/.cache/a.bin", "train/jump/.a.swp")
    datasets = load_video_folder(tmp_path, seed=5)
    assert list(datasets) == ["train", "validation"]
    assert datasets["train"].features == datasets["validation"].features
    assert datasets["train"].features["label"].names == ["jump", "run fast", "sit"]
    assert datasets["train"]["video_id"][:] == ["jump/a.gif", "jump/x/c.mkv", "run fast/b.webm"]
    assert datasets["train"]["label"][:] == [0, 0, 1]
    assert relative_paths(datasets["validation"], tmp_path) == ["val/sit/1.mp4", "val/sit/2.mp4"]

    touch(tmp_path, "Test/walk/1.mov")
    datasets = load_video_folder(tmp_path)
    assert list(datasets) == ["train", "validation", "test"] and datasets["test"]["label"][:] == [3]


def test_drawn_splits_share_no_class_and_lose_no_video(tmp_path):
    touch(tmp_path, *(f"class {index}/{clip}.mp4" for index in range(10) for clip in range(index % 3 + 1)))
    datasets = load_video_folder(tmp_path, seed=1)
    assert list(datasets) == ["train", "validation", "test"]
    classes = {split: {row["video_id"].split("/")[0] for row in dataset} for split, dataset in datasets.items()}
    assert [len(names) for names in classes.values()] == [7, 1, 2]
    assert len(set().union(*classes.values())) == 10
    assert sum(dataset.num_rows for dataset in datasets.values()) == len(list(tmp_path.rglob("*.mp4")))
    for dataset in datasets.values():
        names = dataset.features["label"].names
        assert [names[label] for label in dataset["label"]] == [name.split("/")[0] for name in dataset["video_id"]]

    again = load_video_folder(tmp_path, seed=1)
    assert all(again[split][:] == dataset[:] for split, dataset in datasets.items())
    others = [load_video_folder(tmp_path, seed=seed)["test"]["video_id"][:] for seed in range(2, 5)]
    assert any(ids != datasets["test"]["video_id"][:] for ids in others)
    assert list(load_video_folder(tmp_path, fractions=(0, 0.5, 0.5))) == ["validation", "test"]


def test_without_validation_its_classes_train_and_those_of_the_test_stay(tmp_path):
    touch(tmp_path, *(f"class {index}/{clip}.mp4" for index in range(15) for clip in range(2)))
    three, two = load_video_folder(tmp_path), load_video_folder(tmp_path, validation=False)
    assert list(two) == ["train", "test"] and two["test"]["video_id"][:] == three["test"]["video_id"][:]
    both = three["train"]["video_id"][:] + three["validation"]["video_id"][:]
    assert sorted(two["train"]["video_id"][:]) == sorted(both)
    names = two["train"].features["label"].names
    assert [names[label] for label in two["train"]["label"]] == [id.split("/")[0] for id in two["train"]["video_id"]]


def test_the_division_does_not_depend_on_the_order_of_files(tmp_path):
    names = [f"{letter}/{clip}.mp4" for letter in "abcdefgh" for clip in range(3)]
    touch(tmp_path / "one", *names)
    random.Random(3).shuffle(names)
    touch(tmp_path / "two", *names)
    one, two = load_video_folder(tmp_path / "one"), load_video_folder(tmp_path / "two")
    for split in ("train", "validation", "test"):
        assert one[split]["video_id"][:] == two[split]["video_id"][:]
        assert one[split]["label"][:] == two[split]["label"][:]


def test_frames_in_folders_and_zips_are_clips(tmp_path):
    for class_name in ("run", "sit", "jump"):
        touch(tmp_path, *(f"{class_name}/clip 1/{index:05}.jpg" for index in range(3)), f"{class_name}/clip 1/.meta")
        with zipfile.ZipFile(tmp_path / class_name / "clip 2.zip", "w") as archive:
            archive.writestr("00001.jpg", b"")
    datasets = load_video_folder(tmp_path)
    assert datasets["train"].num_rows + datasets["validation"].num_rows + datasets["test"].num_rows == 6
    assert datasets["test"]["video_id"][0].endswith("/clip 1") and datasets["test"]["video_id"][1].endswith(
        "/clip 2.zip"
    )


def zip_folder(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


@pytest.mark.parametrize(
    "name_of",
    [
        lambda class_name, video_id: f"{class_name}/{video_id}/00001.jpg",
        lambda class_name, video_id: f"{video_id}/00001.jpg",
        lambda class_name, video_id: f"{class_name}/{video_id}.avi",
    ],
    ids=["frames by class", "frames", "videos"],
)
def test_a_benchmark_in_one_archive_is_that_in_a_folder(tmp_path, name_of):
    lists = write_lists(tmp_path / "lists", UCF)
    videos = touch_listed(tmp_path / "UCF 101", UCF, name_of)
    packed = zip_folder(videos, tmp_path / "frames.zip")
    from_folder, from_zip = (load_benchmark("ucf101", place, splits=lists) for place in (videos, packed))
    for split, dataset in from_folder.items():
        assert from_zip[split].features == dataset.features
        assert from_zip[split]["label"][:] == dataset["label"][:]
        assert from_zip[split]["video_id"][:] == dataset["video_id"][:]
        inside = [path.replace(str(videos), f"{packed}#/UCF 101") for path in (v["path"] for v in dataset["video"])]
        assert [video["path"] for video in from_zip[split]["video"]] == inside

    next(videos.rglob("v_YoYo_g01_c02*")).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"1 of 6 videos of ucf101 are missing in .*frames\.zip#/, in 1 class"):
        load_benchmark("ucf101", zip_folder(videos, packed), splits=lists)


def test_a_folder_of_videos_in_an_archive_is_that_outside(tmp_path):
    names = [f"{name}/{clip}" for name in ("run", "sit", "a jump") for clip in ("1.mp4", "2/0001.png", "x/3.webm")]
    videos = touch(tmp_path / "videos", *names, ".DS_Store", "run/.trash/a.mp4")
    packed = f"{zip_folder(videos, tmp_path / 'all.zip')}#/videos"
    outside, inside = load_video_folder(videos), load_video_folder(packed)
    for split, dataset in outside.items():
        assert inside[split]["video_id"][:] == dataset["video_id"][:]
        assert inside[split]["label"][:] == dataset["label"][:]
    assert inside["test"][0]["video"]["path"].startswith(f"{packed}/")
    touch(videos, "run/notes.txt")
    (videos / "sit" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"2 entries of .*#/videos are no video: run/notes\.txt, sit/empty"):
        load_video_folder(f"{zip_folder(videos, tmp_path / 'all.zip')}#/videos")


@pytest.mark.parametrize(
    ("suffix", "codec", "pixels"),
    [
        (".webm", "libvpx-vp9", "yuv420p"),
        (".mkv", "mpeg4", "yuv420p"),
        (".mp4", "mpeg4", "yuv420p"),
        (".MOV", "mpeg4", "yuv420p"),
        (".avi", "mpeg4", "yuv420p"),
        (".gif", "gif", "rgb8"),
        (".flv", "flv1", "yuv420p"),
        (".y4m", "wrapped_avframe", "yuv420p"),
    ],
)
def test_the_paths_of_real_videos_open(tmp_path, suffix, codec, pixels):
    clip = tmp_path / "videos" / "test" / "run" / f"a clip{suffix}"
    clip.parent.mkdir(parents=True)
    with av.open(str(clip), "w", format={".y4m": "yuv4mpegpipe", ".MOV": "mov"}.get(suffix)) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        for shade in (0, 90, 180):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    row = load_video_folder(tmp_path / "videos")["test"][0]
    with av.open(row["video"]["path"]) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["run/a.mp4", "run/notes.txt"], r"1 entries of .* no video: test/run/notes\.txt"),
        (["run/a.mp4", "run/cover.jpg"], r"no video: test/run/cover\.jpg"),
        (["run/0001.jpg", "run/0002.jpg"], r"no video: test/run/0001\.jpg, test/run/0002\.jpg.*folder or zip"),
        (["run/a.mp4", "run/clip/1.jpg", "run/clip/flow.npy"], r"no video: test/run/clip/flow\.npy"),
        (["run/a.mp4", "sit/.hidden.mp4"], r"class folder .*test/sit holds no video"),
        (["run/a.mp4", "loose.mp4"], r"loose\.mp4 .*outside any class"),
    ],
)
def test_what_is_no_clip_is_named(tmp_path, names, message):
    touch(tmp_path / "test", *names)
    with pytest.raises(ValueError, match=message):
        load_video_folder(tmp_path)


def test_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name} is empty"):
        load_video_folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train is empty"):
        load_video_folder(tmp_path)
    touch(tmp_path, "train/run/a.mp4")
    (tmp_path / "train" / "run" / "frames of b").mkdir()
    with pytest.raises(ValueError, match="train/run/frames of b"):
        load_video_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_video_folder(tmp_path / "absent")


def test_folders_that_contradict_each_other(tmp_path):
    touch(tmp_path / "mixed", "train/run/a.mp4", "walk/a.mp4")
    with pytest.raises(ValueError, match="mixes splits and other folders: 'walk'"):
        load_video_folder(tmp_path / "mixed")
    touch(tmp_path / "double", "val/run/a.mp4", "validation/sit/a.mp4")
    with pytest.raises(ValueError, match="two folders for validation: 'val' and 'validation'"):
        load_video_folder(tmp_path / "double")
    touch(tmp_path / "shared", "train/ride bike/a.mp4", "test/Ride_Bike/b.mp4")
    with pytest.raises(ValueError, match=r"class 'Ride_Bike' is in two splits, train and test"):
        load_video_folder(tmp_path / "shared")
    touch(tmp_path / "few", "run/a.mp4", "sit/a.mp4")
    with pytest.raises(ValueError, match="2 classes cannot be divided"):
        load_video_folder(tmp_path / "few")


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_links_are_followed_and_broken_ones_named(tmp_path):
    touch(tmp_path / "store", "a.mp4", "more/b.mp4")
    classes = touch(tmp_path / "root", "test/run/c.mp4") / "test" / "run"
    (classes / "a.mp4").symlink_to(tmp_path / "store" / "a.mp4")
    (classes / "more").symlink_to(tmp_path / "store" / "more")
    assert load_video_folder(tmp_path / "root")["test"]["video_id"][:] == ["run/a.mp4", "run/c.mp4", "run/more/b.mp4"]
    (classes / "d.mp4").symlink_to(tmp_path / "store" / "gone.mp4")
    with pytest.raises(ValueError, match=r"no video: test/run/d\.mp4"):
        load_video_folder(tmp_path / "root")
    (classes / "d.mp4").unlink()
    (classes / "again").symlink_to(classes)
    with pytest.raises(OSError, match="again"):
        scan_videos(tmp_path / "root")


def test_one_top_folder_is_gone_into_and_named(tmp_path, caplog):
    names = [f"hmdb/{label}/{clip}.mp4" for label in ("run", "sit", "wave") for clip in "ab"]
    touch(tmp_path / "root", *names, "__MACOSX/hmdb/run/._a.mp4")
    inside = load_video_folder(tmp_path / "root" / "hmdb")
    found = load_video_folder(tmp_path / "root")
    assert {split: rows["video_id"][:] for split, rows in found.items()} == {
        split: rows["video_id"][:] for split, rows in inside.items()
    }
    assert "root holds nothing but the folder 'hmdb'" in caplog.text
    assert list_class_clips(tmp_path / "root") == list_class_clips(tmp_path / "root" / "hmdb")
    with zipfile.ZipFile(tmp_path / "root.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "root" / name, name)
    assert load_video_folder(tmp_path / "root.zip")["test"]["video_id"][:] == inside["test"]["video_id"][:]
    touch(tmp_path / "split", "data/train/run/a.mp4", "data/test/sit/a.mp4")
    assert list(load_video_folder(tmp_path / "split")) == ["train", "test"]


def test_one_class_is_no_top_folder(tmp_path):
    touch(tmp_path / "frames", "run/first/1.jpg", "run/second/1.jpg")
    assert list(list_class_clips(tmp_path / "frames")) == ["run"]
    touch(tmp_path / "nested", "run/monday/a.mp4", "run/tuesday/b.mp4")
    rows = load_video_folder(tmp_path / "nested", fractions=(0, 0, 1))["test"]
    assert rows["video_id"][:] == ["run/monday/a.mp4", "run/tuesday/b.mp4"]
