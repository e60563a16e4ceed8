"""The life of an `mga` adapter: in peft and in transformers, saved, loaded, trained, compiled and distributed."""

import gc
import sys
import time
from datetime import timedelta

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging.version import Version
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from dmgal_hf.peft import CmgaLayer, MgaConfig, SmgaLayer, SupportCache

LAYERS = 3
FACTS = {"num_frames": 2, "num_support": [2, 1]}  # two episodes of three videos of two frames


def backbone(width=32, layers=LAYERS):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).eval()


def config(**fields):
    return MgaConfig(**{"num_frames": 2, "init_weights": False} | fields)


def shake(model, seed=1):
    """Give all adapters weights with which they change much."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "mga_adapter" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def adapted(**fields):
    return shake(get_peft_model(backbone(), config(**fields))).eval()


@pytest.fixture(scope="module")
def videos():
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def features(model, videos, **facts):
    with torch.no_grad():
        return model(videos, **(facts or FACTS)).last_hidden_state


def close(first, second):
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5)


# peft


def test_save_and_load(tmp_path, videos):
    model = adapted(width=5, directions="forward", cmga_layers=[0])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = [name for name, _ in model.named_parameters() if "mga_adapter" in name]
    assert sorted(saved) == sorted(name.replace(".default", "") for name in own)
    assert not list(tmp_path.glob("*.bin"))

    loaded = PeftModel.from_pretrained(backbone(), tmp_path)
    assert close(features(loaded, videos), features(model, videos))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    frugal = PeftModel.from_pretrained(backbone(), tmp_path, low_cpu_mem_usage=True)
    assert close(features(frugal, videos), features(model, videos))


def test_only_adapters_and_modules_to_save_train(videos):
    model = adapted(modules_to_save=["post_layernorm"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        name for name, _ in model.named_parameters() if "mga_adapter" in name or "modules_to_save" in name
    }
    model.train()
    model(videos, **FACTS).pooler_output.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable


def test_several_adapters(videos):
    model = get_peft_model(backbone(), config())
    with model.disable_adapter():
        base = features(model, videos)
    model.add_adapter("other", config(width=4, cmga_layers=[0], smga_layers=[1], attention=False))
    shake(model).eval()
    layers = [module for module in model.modules() if isinstance(module, (SmgaLayer, CmgaLayer))]
    # The first block has a Cmga-Adapter in one adapter and an Smga-Adapter in the other.
    assert [type(layer) for layer in layers] == [CmgaLayer, SmgaLayer, CmgaLayer]

    default = features(model, videos)
    model.set_adapter("other")
    other = features(model, videos)
    assert not close(default, other)
    assert not close(base, other)
    with model.disable_adapter():
        assert torch.equal(features(model, videos), base)
    assert torch.equal(features(model, videos), other)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(features(model, videos), default)
    assert not any("other" in name for name, _ in model.named_parameters())
    restored = model.unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in restored.modules())
    assert restored.state_dict().keys() == backbone().state_dict().keys()
    assert torch.equal(features(restored, videos), base)


def test_changes_of_active_adapters_add_up(videos):
    model = get_peft_model(backbone(), config(cmga_layers=[], smga_layers=[1]))
    model.add_adapter("other", config(cmga_layers=[], smga_layers=[1], width=4))
    shake(model).eval()
    entering = []
    model.base_model.model.encoder.layers[1].base_layer.register_forward_pre_hook(
        lambda module, args: entering.append(args[0])
    )
    with model.disable_adapter():
        features(model, videos)
    features(model, videos)
    model.base_model.set_adapter("other")
    features(model, videos)
    model.base_model.set_adapter(["default", "other"])
    features(model, videos)
    base, default, other, both = entering
    torch.testing.assert_close(both - base, default - base + other - base, rtol=1e-4, atol=1e-5)
    assert (other - base).abs().max() > 0.1


def test_adapters_of_two_repositories(tmp_path, videos):
    first, second = adapted(), shake(get_peft_model(backbone(), config(directions="backward")), seed=5).eval()
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(backbone(), tmp_path / "first", adapter_name="a")
    model.load_adapter(tmp_path / "second", adapter_name="b")
    assert close(features(model, videos), features(first, videos))
    model.set_adapter("b")
    assert close(features(model.eval(), videos), features(second, videos))


@pytest.mark.parametrize("act", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused_with_the_reason(act):
    with pytest.raises(NotImplementedError, match=r"cannot be merged.*compare neighbouring frames"):
        getattr(adapted(), act)()


@pytest.mark.parametrize(("width", "layers"), [(48, LAYERS), (32, LAYERS + 1), (32, LAYERS - 1)])
def test_adapters_for_another_backbone_are_refused(tmp_path, width, layers):
    adapted().save_pretrained(tmp_path)
    message = rf"made for a backbone of 3 blocks of width 32, but CLIPVisionModel has {layers} blocks of width {width}"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(backbone(width, layers), tmp_path)


# transformers


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"this transformers asks for peft {MIN_PEFT_VERSION}"
)
def test_transformers_own_adapter_calls(tmp_path, videos):
    model = backbone()
    base = features(model, videos)
    model.add_adapter(config(), adapter_name="mine")
    shake(model).eval()
    mine = features(model, videos)
    assert not close(mine, base)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    loaded = backbone()
    report = loaded.load_adapter(tmp_path, adapter_name="theirs")
    assert not (report.missing_keys or report.unexpected_keys or report.mismatched_keys)
    assert close(features(loaded, videos), mine)
    loaded.add_adapter(MgaConfig(num_frames=2), adapter_name="fresh")
    assert torch.equal(features(loaded, videos), base)
    loaded.set_adapter("theirs")
    assert close(features(loaded, videos), mine)
    loaded.disable_adapters()
    assert torch.equal(features(loaded, videos), base)
    loaded.enable_adapters()
    assert close(features(loaded, videos), mine)
    loaded.delete_adapter("theirs")
    loaded.delete_adapter("fresh")
    assert torch.equal(features(loaded, videos), base)
    # What transformers saved is what peft loads.
    assert close(features(PeftModel.from_pretrained(backbone(), tmp_path), videos), mine)


class WholeConfig(PreTrainedConfig):
    model_type = "mga_test_whole"

    def __init__(self, backbone_config=None, adapter_config=None, **kwargs):
        self.backbone_config = backbone_config
        self.adapter_config = adapter_config
        super().__init__(**kwargs)


class WholeModel(PreTrainedModel):
    """A transformers model that holds a backbone and tells it the episode facts itself, as DmgalModel does."""

    config_class = WholeConfig

    def __init__(self, config):
        super().__init__(config)
        self.backbone = CLIPVisionModel(AutoConfig.for_model(**config.backbone_config))
        if config.adapter_config is not None:
            inject_adapter_in_model(MgaConfig(**config.adapter_config), self.backbone)
        self.post_init()

    def forward(self, videos):
        cache = SupportCache()
        facts = {"num_frames": 2, "support_cache": cache}
        supports = self.backbone(videos[:4], num_support=2, **facts).last_hidden_state
        queries = self.backbone(videos[4:], num_support=0, **facts).last_hidden_state
        return torch.cat((supports, queries))


def whole_model(adapter_config=None):
    torch.manual_seed(0)
    return WholeModel(WholeConfig(backbone().config.to_dict(), adapter_config)).eval()


def test_full_checkpoints_bring_their_adapters(tmp_path, videos):
    model = shake(whole_model({"num_frames": 2, "width": 6}))
    with torch.no_grad():
        expected = model(videos)
        model.save_pretrained(tmp_path)
        loaded, report = WholeModel.from_pretrained(tmp_path, output_loading_info=True)  # built on the meta device
        assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
        assert close(loaded.eval()(videos), expected)
    assert isinstance(loaded.backbone.encoder.layers[-1], CmgaLayer)


def test_peft_on_a_whole_model(tmp_path, videos):
    with torch.no_grad():
        plain = whole_model()(videos)
        model = get_peft_model(whole_model(), MgaConfig(num_frames=2)).eval()
        assert torch.equal(model(videos), plain)
        adapted_features = shake(model)(videos)
        assert not close(adapted_features, plain)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(whole_model(), tmp_path)
        assert close(loaded(videos), adapted_features)
        assert torch.equal(loaded.unload()(videos), plain)


# Training and running


def gradients(model, videos, facts=FACTS):
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    model(videos, **facts).last_hidden_state.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(videos, use_reentrant):
    model = adapted(dropout=0.2)
    expected = gradients(model, videos)

    def saved_bytes():
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(videos, **FACTS)
        return count

    without = saved_bytes()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert saved_bytes() < without / 3
    got = gradients(model, videos)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


def test_training_fits_a_target(videos):
    model = get_peft_model(backbone(), MgaConfig(num_frames=2))
    target = features(adapted(), videos)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (model(videos, **FACTS).last_hidden_state - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(videos, dtype):
    model = adapted()
    expected = features(model, videos)
    for keep_float32 in (True, False):
        half = get_peft_model(backbone().to(dtype), config(), autocast_adapter_dtype=keep_float32).eval()
        half.load_state_dict(model.state_dict())
        weight = half.base_model.model.encoder.layers[0].mga_adapter["default"].down.weight
        assert weight.dtype == (torch.float32 if keep_float32 else dtype)
        got = features(half, videos.to(dtype))
        assert got.dtype == dtype
        assert nn.functional.cosine_similarity(got.float().flatten(), expected.flatten(), dim=0) > 0.99
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            got = features(model, videos)
        assert nn.functional.cosine_similarity(got.float().flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.slow
def test_compiled_without_a_graph_break(videos):
    model = adapted(support_pooling=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(features(compiled, videos), features(model, videos))
    caches = SupportCache(), SupportCache()
    for module, cache in zip((model, compiled), caches, strict=True):
        features(module, videos[:8], num_frames=2, num_support=4, support_cache=cache)
    queries = {"num_frames": 2, "num_support": 0}
    torch.testing.assert_close(
        features(compiled, videos[8:], support_cache=caches[1], **queries),
        features(model, videos[8:], support_cache=caches[0], **queries),
    )


def train_in_parallel(rank, videos):
    model = adapted().train()
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):  # DDP notices weights without a gradient at the second step
        parallel.zero_grad()
        episode = videos[6 * rank : 6 * rank + 6]
        parallel(episode, num_frames=2, num_support=2).last_hidden_state.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def train_in_a_process(rank, rendezvous, videos, outcome):
    torch.set_num_threads(1)
    minute = timedelta(minutes=1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=minute)
    try:
        found = train_in_parallel(rank, videos)
        if rank == 0:
            torch.save(found, outcome)
        while not outcome.exists():  # gloo may still be sending to the first process when the second is done
            time.sleep(0.05)
        gc.collect()  # a DistributedDataParallel that outlives its process group may wait for ever
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file rendezvous needs a POSIX path")
def test_two_processes_average_the_gradients_of_two_episodes(tmp_path, videos):
    arguments = tmp_path / "rendezvous", videos, tmp_path / "gradients.pt"
    mp.start_processes(train_in_a_process, arguments, nprocs=2, start_method="forkserver")
    got = torch.load(tmp_path / "gradients.pt", weights_only=True)
    expected = gradients(adapted(), videos, {"num_frames": 2, "num_support": [2, 2]})
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)
