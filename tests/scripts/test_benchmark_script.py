"""scripts/benchmark.py on tiny shapes: what it reports, and that contenders agree. Never how fast anything is."""

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmgal_hf.model.video_decoding import segment_indices
from dmgal_hf.training.arguments import parse_arguments

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"
sys.path.insert(0, str(SCRIPT.parent))

from benchmarks import data, feed, head, measuring, support, train  # noqa: E402


@pytest.fixture(scope="module")
def benchmark():
    threads = torch.get_num_threads()
    yield importlib.import_module("benchmark")
    torch.set_num_threads(threads)


def run_part(benchmark, part, tmp_path, *options):
    """The part of the JSON file; its rows by group and contender."""
    path = tmp_path / "result.json"
    argv = ["--only", part, "--small", "--repeats", "1", "--threads", "1", "--no_memory", "--json", str(path)]
    benchmark.main(*parse_arguments((measuring.BenchmarkArguments,), [*argv, *options]))
    result = json.loads(path.read_text())
    groups = result["parts"][part]["groups"]
    return result, {group["name"]: {row["name"]: row for row in group["contenders"]} for group in groups}


def check_structure(result, part, printed):
    environment = result["environment"]
    assert environment["threads"] == environment["repeats"] == 1 and environment["small"] is True
    assert environment["device"] and environment["versions"]["torch"] == torch.__version__
    assert list(result["parts"]) == [part] and result["parts"][part]["groups"]
    for group in result["parts"][part]["groups"]:
        assert f"### {group['name']}" in printed
        rows = group["contenders"]
        assert len(rows) >= 2 and rows[0]["name"] == group["baseline"] and rows[0]["time_ratio"] == 1
        for row in rows:
            assert len(row["seconds"]) == 1 and row["median_seconds"] == row["seconds"][0] > 0
            assert row["time_ratio"] == pytest.approx(row["seconds"][0] / rows[0]["seconds"][0])
            assert f"| {row['name']} | {row['time_ratio']:.2f} |" in printed
    for skipped in result["parts"][part]["skipped"]:
        assert skipped in printed


@pytest.mark.slow
def test_head(benchmark, tmp_path, capsys):
    result, groups = run_part(benchmark, "head", tmp_path)
    check_structure(result, "head", capsys.readouterr().out)
    assert len(groups) == 4
    for rows in groups.values():  # outputs, or gradients of the maps, against the plain equations
        assert rows["plain PyTorch"]["difference"] < 2e-5
    assert any("--reference" in skipped for skipped in result["parts"]["head"]["skipped"])


@pytest.mark.slow
def test_growth(benchmark, tmp_path, capsys):
    result, groups = run_part(benchmark, "growth", tmp_path, "--plot", str(tmp_path / "growth.png"))
    check_structure(result, "growth", capsys.readouterr().out)
    assert len(groups) == 4
    for name, rows in groups.items():
        axis = name.removeprefix("C-MGA against ").split(": ")[0]
        sizes = [int(row.split(",")[0].removeprefix(axis)) for row in rows]
        assert sizes == sorted(sizes) and len(set(sizes)) == 2
        for row in rows:
            if row.endswith("plain PyTorch"):
                assert rows[row]["difference"] < 2e-5
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_adapter(benchmark, tmp_path, capsys):
    result, groups = run_part(benchmark, "adapter", tmp_path)
    check_structure(result, "adapter", capsys.readouterr().out)
    assert len(groups) == 2
    for rows in groups.values():
        trainable = [int(rows[name]["note"].split()[0].replace(",", "")) for name in ("MGA adapters", "LoRA (peft)")]
        assert trainable[1] == pytest.approx(trainable[0], rel=0.2)  # equal up to one rank
        assert rows["MGA adapters"]["difference"] == 0  # a fresh adapter is the identity


@pytest.mark.slow
def test_support(benchmark, tmp_path, capsys):
    result, groups = run_part(benchmark, "support", tmp_path)
    check_structure(result, "support", capsys.readouterr().out)
    streams = groups.pop("ResNet-50, DMGAL-FT: 60 s in windows of 2 s")
    assert streams["one pass of the backbone over its sampled frames"]["note"] == "24 of 180 frames"
    assert streams["stream, windows end to end: once through the whole model"]["note"] == "3 windows"
    assert streams["stream, a window every 0.5 s"]["note"] == "9 windows"
    assert len(groups) == 3
    for rows in groups.values():
        assert rows["one query, kept 5-way 5-shot supports"]["difference"] < 1e-5
        assert "difference" not in rows["the backbone on one video"]


@pytest.mark.slow
def test_data(benchmark, tmp_path, capsys):
    result, groups = run_part(benchmark, "data", tmp_path, "--folder", str(tmp_path / "made"))
    check_structure(result, "data", capsys.readouterr().out)
    fetching = [rows for rows in groups.values() if "PyAV, all frames" in rows]
    assert len(fetching) == 3
    for rows in fetching:
        assert rows["dmgal_hf"]["wrong_frames"] == 0 and rows["dmgal_hf"]["grey_levels"] == 0
        assert rows["dmgal_hf"]["fetched_frames"] == 32
    (cache,) = [rows for rows in groups.values() if "JPEG cache" in rows]
    assert cache["raw cache"]["grey_levels"] == 0 < cache["JPEG cache"]["grey_levels"]
    assert cache["JPEG cache"]["wrong_frames"] == 0
    assert groups["data loader over episodes"]["2 workers"]["difference"] == 0


@pytest.mark.slow
def test_train(benchmark, tmp_path, capsys):
    result, groups = run_part(benchmark, "train", tmp_path)
    check_structure(result, "train", capsys.readouterr().out)
    ((one, two),) = [rows.values() for rows in groups.values()]
    for row in (one, two):  # a step has two episodes, whoever computes them
        assert row["episodes_per_second"] == pytest.approx(2 / row["median_seconds"])
        assert row["memory_gib"] > 0
    work = [row["flops_per_second"] * row["median_seconds"] for row in (one, two)]
    assert work[0] == pytest.approx(work[1]) and work[0] > 1e6


def test_wrong_frames_are_counted(benchmark, tmp_path):
    arguments = measuring.BenchmarkArguments(small=True, folder=str(tmp_path))
    paths = data.make_clips(data.SSV2, arguments)[:2]
    clips = [data.decode_all(path) for path in paths]
    picks = [segment_indices(len(clip), measuring.NUM_FRAMES) for clip in clips]
    right = [clip[pick] for clip, pick in zip(clips, picks, strict=True)]
    assert data.compare_frames(paths, right, right)["wrong_frames"] == 0
    late = clips[1][[pick + 1 if k < 3 else pick for k, pick in enumerate(picks[1])]]
    facts = data.compare_frames(paths, [right[0], late], right)
    assert facts["wrong_frames"] == 3 and facts["fetched_frames"] == 16 and facts["grey_levels"] > 0


MEASURED = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from benchmarks.measuring import Contender, Group, Run, measure_memory

def prepare():
    np.ones(60 << 20, np.uint8)  # freed before the call: not the call's
    kept = np.ones(20 << 20, np.uint8)
    def call():
        np.ones(40 << 20, np.uint8)
        return kept.sum() + np.ones(10 << 20, np.uint8).sum()
    return Run(call)

print(measure_memory("g|c", [Group("g", [Contender("c", prepare)])], "cpu"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be set back on Linux alone")
def test_memory_is_what_the_call_adds_at_its_peak():
    done = subprocess.run([sys.executable, "-c", MEASURED, str(SCRIPT.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == pytest.approx(40 << 20, abs=4 << 20)


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(benchmark):
    arguments = measuring.BenchmarkArguments(only=["head"], small=True, threads=1)
    assert measuring.memory_of_its_own_process("C-MGA alone: forward|plain PyTorch", arguments) > 0
    with pytest.raises(
        ValueError, match=r"must be one of .*forward\|dmgal_hf; .*, got 'C-MGA alone: forward\|nobody'"
    ):
        measuring.measure_memory("C-MGA alone: forward|nobody", head.head_groups(arguments)[0], "cpu")


OFFICIAL = """
import no_such_module
from torch.nn import Module

raise SystemExit("the file as a whole must not run")

class mSEModule(nn.Module):
    def forward(self, x):
        return F.relu(x)

class Other(no_such_module.Base):
    pass
"""


def test_classes_of_the_reference_are_taken_alone(benchmark, tmp_path):
    (tmp_path / "DMGAL.py").write_text(OFFICIAL)
    classes = head.load_official_classes(str(tmp_path), ["mSEModule"])
    assert list(classes) == ["mSEModule"]
    assert torch.equal(classes["mSEModule"]()(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match=r"has no class spa_mix_2"):
        head.load_official_classes(str(tmp_path), ["mSEModule", "spa_mix_2"])
    with pytest.raises(FileNotFoundError, match=r"nowhere/DMGAL\.py: give a checkout"):
        head.load_official_classes(str(tmp_path / "nowhere"), ["mSEModule"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "heads"], r"only must name parts out of head, growth, adapter, .*, got \['heads'\]"),
        (["--only", "head", "--plot", "growth.png"], "only is head: add growth"),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--threads", "-1"], "threads must be at least 1, got -1"),
        (["--device", "mps"], "device must be cpu or cuda, got 'mps'"),
        (["--repeat", "3"], "Did you mean 'repeats'"),
    ],
)
def test_bad_options(benchmark, argv, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments((measuring.BenchmarkArguments,), argv)


@pytest.mark.slow
def test_feed(benchmark, tmp_path, capsys):
    result, groups = run_part(benchmark, "feed", tmp_path, "--folder", str(tmp_path / "made"))
    check_structure(result, "feed", capsys.readouterr().out)
    alone, under = groups.values()
    assert list(alone) == ["files", "JPEG cache", "raw cache", "memory"] and list(under) == ["files", "raw cache"]
    assert alone["memory"]["difference"] == 0 < alone["JPEG cache"]["difference"]
    for row in (*alone.values(), *under.values()):
        assert row["episodes_per_second"] > 0
    assert all(0 <= row["data_wait_share"] <= 1 for row in under.values())


def test_time_of_a_gpu_that_runs_several_kernels_at_once_counts_once():
    assert measuring.covered([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4 and measuring.covered([]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["head", "support"])
def test_what_is_measured_on_a_gpu_runs_but_for_the_card(benchmark, tmp_path, capsys, monkeypatch, part):
    ceilings = {"bf16_flops_per_second": 1e12, "copied_bytes_per_second": 1e12}
    for module in (benchmark, measuring, head, support):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
        monkeypatch.setattr(module, "as_graph", lambda call: call, raising=False)
        monkeypatch.setattr(module, "measure_ceilings", lambda device: ceilings, raising=False)
    monkeypatch.setattr(
        measuring, "profile_kernels", lambda call: (call(), {"kernel_seconds": 0.001, "launches": 1})[1]
    )
    monkeypatch.setattr(measuring, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    result, groups = run_part(benchmark, part, tmp_path)
    check_structure(result, part, printed := capsys.readouterr().out)
    for rows in groups.values():
        for name, row in rows.items():
            assert row["flops"] > 0 and row["ceiling_share"] > 0 and row["memory_gib"] == 1, name
            assert row.get("difference", 0) < 0.05, name

    for group in result["parts"][part]["groups"]:
        for reach in group["reaches"]:  # each query beside the bare backbone, which is the first
            assert reach["value"] == groups[group["name"]][reach["contender"]]["time_ratio"]
            assert f"{'reached' if reach['reached'] else 'MISSED'}: {reach['contender']}, seconds in parts" in printed
    assert sum(len(group["reaches"]) for group in result["parts"][part]["groups"]) == {"head": 0, "support": 2}[part]


def test_what_is_to_be_reached_on_a_gpu_has_rows(monkeypatch, tmp_path):
    for module in (head, support, train, feed):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    monkeypatch.setattr(head, "has_fast_bfloat16", lambda device: True)
    arguments = measuring.BenchmarkArguments(reference=str(tmp_path), folder=str(tmp_path))
    groups = [group for part in (head, train, support, feed)
              for group in getattr(part, f"{part.__name__.split('.')[-1]}_groups")(arguments)[0]]  # fmt: skip
    for group in groups:
        named = {name for reach in group.reaches for name in (reach.contender, reach.to) if name is not None}
        assert named <= {contender.name for contender in group.contenders}, group.name
    assert sum(len(group.reaches) for group in groups) == 3 + 5 + 2 + 1


def test_a_figure_is_reached_or_missed_round_by_round():
    rows = {"a": {"seconds": [1.0, 4.0, 1.0], "share": 0.5}, "b": {"seconds": [2.0, 4.0, 8.0], "share": 2.0}}
    measured = measuring.Reach("a", "seconds", "b", at_most=0.5).measure(rows)
    assert measured["value"] == 0.5 and measured["reached"]
    assert not measuring.Reach("a", "share", "b", at_least=0.3).measure(rows)["reached"]
    assert measuring.Reach("a", "share", at_least=0.5).measure(rows)["reached"]


@pytest.mark.slow
def test_evaluate(benchmark, tmp_path, capsys):
    result, groups = run_part(benchmark, "evaluate", tmp_path, "--folder", str(tmp_path / "made"))
    counted = result["parts"]["evaluate"]["groups"].pop()
    check_structure(result, "evaluate", capsys.readouterr().out)
    assert len(groups) == 7
    for name, rows in groups.items():
        if "every episode by itself" in rows and name != counted["name"]:
            assert list(rows) == ["dmgal_hf", "every episode by itself", "one pass over the clips"]
            plain = rows["every episode by itself"]
            assert plain["difference"] < 1e-6
            assert plain["note"] == ("all of them" if "validation" in name else "extrapolated from 2 episodes")
    # 8 episodes of 4 clips, or 12 clips once and then, of two blocks, the second for 8 x 2 queries.
    ours, plain = counted["contenders"]
    assert ours["flop_ratio"] == 1 and plain["flops"] == pytest.approx(ours["flops"] * plain["flop_ratio"])
    assert 1.5 < plain["flop_ratio"] < 32 / 12
