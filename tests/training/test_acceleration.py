"""Precision, compiled blocks and replayed steps of a run: nothing of it shows in what is saved or computed."""

import functools
import logging
import platform
import subprocess
import sys

import pytest
import torch
from card_on_the_cpu import pretend_card
from transformers import CLIPVisionConfig, ResNetConfig

from dmgal_hf import DmgalConfig, DmgalModel
from dmgal_hf.data.cuda_graphs import ReplayedCall
from dmgal_hf.training.acceleration import compile_regions, hold_frozen_backbone

CLIP = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


def make_model(layers=2, **fields):
    torch.manual_seed(0)
    fields = fields or {
        "backbone_config": CLIPVisionConfig(**CLIP, num_hidden_layers=layers),
        "paradigm": "adapter",
        "adapter_config": {},
    }
    return DmgalModel(DmgalConfig(num_frames=4, **fields))


def make_episode(seed=0):
    videos = torch.randn(1, 6, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"support_pixel_values": videos[:, :2], "support_labels": torch.tensor([[0, 1]]),
            "query_pixel_values": videos[:, 2:], "labels": torch.tensor([[0, 1, 1, 0]]), "way": 2}  # fmt: skip


def test_a_frozen_backbone_is_held_in_bfloat16_and_gives_back_what_came():
    model, other = make_model(), make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hold_frozen_backbone(model, "bf16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    # Another state is taken over to the last bit too, and computed with.
    state = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    model.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    other.load_state_dict(state)
    weight = "backbone.encoder.layers.0.base_layer.mlp.fc1.weight"
    assert torch.equal(model.get_parameter(weight), other.get_parameter(weight).bfloat16())


@pytest.mark.parametrize(
    ("precision", "fields"),
    [
        ("no", {}),
        ("fp16", {}),
        ("bf16", {"backbone_config": RESNET, "motion_reduction": 4}),
        ("bf16", {"backbone_config": CLIPVisionConfig(**CLIP, num_hidden_layers=2), "paradigm": "adapter",
                  "adapter_config": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}}),
    ],
)  # fmt: skip
def test_what_is_left_to_autocast(precision, fields):
    model = make_model(**fields)
    hold_frozen_backbone(model, precision)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_adapters_learn_on_a_backbone_held_in_bfloat16():
    model = make_model()
    hold_frozen_backbone(model, "bf16")
    optimizer = torch.optim.AdamW([one for one in model.train().parameters() if one.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**make_episode()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of glibc")
def test_freed_memory_is_kept():
    script = (
        "import resource, torch\n"
        "from dmgal_hf.training.acceleration import keep_freed_memory\n"
        "def new_pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(40):\n"
        "        tensors = [torch.zeros(2**21 * number) for number in (1, 3, 2)]\n"
        "        del tensors\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "left_alone = new_pages()\n"
        "keep_freed_memory()\n"
        "print(left_alone, new_pages())\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    left_alone, kept = map(int, found.stdout.split())
    assert kept < left_alone / 4


def count_graphs(monkeypatch, layers):
    """Graphs that compiled blocks of a model take, and the loss, which is that of the plain model."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = make_model(layers).train()
    expected = model(**make_episode()).loss
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        compile_regions(model)
    loss = model(**make_episode()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    return len(graphs)


@pytest.mark.slow
def test_all_blocks_of_a_kind_share_what_is_compiled(monkeypatch):
    assert count_graphs(monkeypatch, 4) == count_graphs(monkeypatch, 6)


def test_a_call_is_captured_when_a_shape_comes_again_and_its_results_are_kept(monkeypatch):
    counts, context = pretend_card(monkeypatch), [0]
    call = ReplayedCall(lambda inputs: (2 * inputs["x"],), context=lambda: context[0])
    results = [call({"x": torch.full((2,), float(number))})[0] for number in range(4)]
    assert [result.tolist() for result in results] == [[0, 0], [2, 2], [4, 4], [6, 6]] and counts["captured"] == 1
    call({"x": torch.zeros(3)})
    assert counts["captured"] == 1
    context[0] = 1  # other weights
    call({"x": torch.zeros(2)})
    assert counts["captured"] == 1
    call({"x": torch.zeros(2)})
    assert counts["captured"] == 2 and not call.failed


def test_a_call_that_cannot_be_captured_runs_plainly_and_says_so_once(monkeypatch, caplog):
    call = ReplayedCall(lambda inputs: (2 * inputs["x"],))

    def fail(inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(call, "_capture", fail)
    with caplog.at_level(logging.WARNING):
        results = [call({"x": torch.ones(1) * number})[0].item() for number in range(4)]
    assert results == [0, 2, 4, 6]
    assert [record.message.count("not permitted when stream is capturing") for record in caplog.records] == [1]


def train_plainly_and_replayed(kind, device):
    """Losses and state of five steps, with dropout, plain ones first."""
    results = []
    for replayed in (False, True):
        fields = {} if kind == "adapter" else {"backbone_config": RESNET, "motion_reduction": 4}
        model = make_model(**fields).to(device).train()
        trainable = [one for one in model.parameters() if one.requires_grad]
        for one in trainable:
            one.grad = torch.zeros_like(one)

        def step(inputs, model=model):
            loss = model(**inputs, way=2).loss
            loss.backward()
            return (loss.detach(),)

        changed = [*model.buffers(), *(one.grad for one in trainable)]
        call = ReplayedCall(step, changed.copy) if replayed else step
        losses = []
        for number in range(5):
            inputs = {name: value.to(device) for name, value in make_episode(number).items() if torch.is_tensor(value)}
            torch.manual_seed(number)
            losses.append(call(inputs)[0])
            with torch.no_grad():
                for one in trainable:
                    one -= 0.01 * one.grad
                    one.grad.zero_()
        assert not replayed or (len(call.graphs) == 1 and not call.failed)
        results.append((torch.stack(losses), {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    return results


@pytest.mark.parametrize("kind", ["adapter", "ft"])
def test_replayed_steps_equal_plain_ones(monkeypatch, kind):
    counts = pretend_card(monkeypatch)
    (losses, state), (replayed_losses, replayed_state) = train_plainly_and_replayed(kind, "cpu")
    assert torch.equal(replayed_losses, losses)
    assert all(torch.equal(replayed_state[name], tensor) for name, tensor in state.items())
    assert counts == {"captured": 1, "replayed": 2 + 4}  # tried twice, to no effect


def test_a_replay_that_leaves_a_change_out_is_found(monkeypatch, caplog):
    pretend_card(monkeypatch)
    total, outside = torch.zeros(1), []

    def add(inputs):
        outside.append(total)
        if len(outside) != 3:  # which is the captured one
            total.add_(inputs["x"])
        return (2 * inputs["x"],)

    call = ReplayedCall(add, lambda: [total])
    assert [call({"x": torch.ones(1)})[0].item() for _ in range(4)] == [2, 2, 2, 2]
    assert total.item() == 4 and call.failed
    assert ["differs from the plain call" in record.message for record in caplog.records] == [True]


def test_a_value_that_came_to_the_host_is_found_with_other_inputs(monkeypatch, caplog):
    pretend_card(monkeypatch)
    call = ReplayedCall(lambda inputs: (inputs["x"] * float(inputs["x"]),))
    assert [call({"x": torch.full((1,), float(number))})[0].item() for number in range(6)] == [0, 1, 4, 9, 16, 25]
    assert ["differs from the plain call" in record.message for record in caplog.records] == [True]


def test_values_that_are_noise_need_not_be_repeated(monkeypatch):
    pretend_card(monkeypatch)
    other = torch.Generator().manual_seed(0)
    call = ReplayedCall(lambda inputs: (torch.empty(100).normal_(generator=other).detach(), 2 * inputs["x"]))
    assert [call({"x": torch.ones(1)})[1].item() for _ in range(4)] == [2, 2, 2, 2] and not call.failed


def test_a_graph_that_takes_more_memory_than_it_leaves_is_given_back(monkeypatch, caplog):
    pretend_card(monkeypatch)
    call = ReplayedCall(lambda inputs: (2 * inputs["x"],))
    sizes = {"memory_reserved": iter([10**9, 7 * 10**9]), "mem_get_info": iter([(4 * 10**9, 0)])}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: next(size))
    assert [call({"x": torch.ones(1)})[0].item() for _ in range(4)] == [2, 2, 2, 2] and call.graphs == {}
    (record,) = caplog.records
    assert "it would take 6.0 GB of memory and leave 4.0 GB" in record.message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device to capture a graph on")
@pytest.mark.parametrize("kind", ["adapter", "ft"])
def test_replayed_steps_on_a_gpu_equal_plain_ones(kind):
    results = train_plainly_and_replayed(kind, "cuda")
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, atol=1e-3, rtol=1e-3)
