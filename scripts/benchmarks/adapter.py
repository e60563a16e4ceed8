"""Adapters: MGA in a frozen CLIP ViT-B/16 beside the bare backbone and LoRA of equal size."""

import functools

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from dmgal_hf import MgaConfig

from .measuring import NUM_FRAMES, BenchmarkArguments, Contender, Group, Run


def clip_config(small: bool) -> CLIPVisionConfig:
    if small:
        return CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                image_size=32, patch_size=8)  # fmt: skip
    return CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                            image_size=224, patch_size=16)  # fmt: skip


def count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def make_backbone(kind: str, small: bool, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = CLIPVisionModel(clip_config(small)).requires_grad_(False).eval()
    if kind == "frozen":
        return model.to(device)
    if kind == "mga":
        return get_peft_model(model, MgaConfig()).to(device)
    budget = count_trainable(make_backbone("mga", small, "cpu"))
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    of_rank_one = model.config.num_hidden_layers * len(targets) * 2 * model.config.hidden_size
    return get_peft_model(model, LoraConfig(r=max(round(budget / of_rank_one), 1), target_modules=targets)).to(device)


def prepare_adapter(arguments: BenchmarkArguments, kind: str, training: bool) -> Run:
    """One support and one query video; a step of training is forward, backward and AdamW."""
    model = make_backbone(kind, arguments.small, arguments.device)
    size = model.config.image_size if kind == "frozen" else model.base_model.model.config.image_size
    pixel_values = torch.randn(2 * NUM_FRAMES, 3, size, size, generator=torch.Generator().manual_seed(1))
    pixel_values = pixel_values.to(arguments.device)
    facts = {"num_frames": NUM_FRAMES, "num_support": [1]} if kind == "mga" else {}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    share = count_trainable(model) / sum(one.numel() for one in model.parameters() if not one.requires_grad)
    note = f"{count_trainable(model):,} trainable, {share:.2%} of the backbone" if trainable else ""
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None

    def call():
        learns = training and optimizer is not None
        with torch.set_grad_enabled(learns):
            output = model(pixel_values=pixel_values, **facts).last_hidden_state
        if learns:
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return (output,)

    return Run(call, model, note)


def adapter_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    groups = []
    for step in ("forward", "training step"):
        training = step != "forward"
        frozen = "frozen backbone, forward only" if training else "frozen backbone"
        contenders = [
            Contender(name, functools.partial(prepare_adapter, arguments, kind, training), same_as)
            # a fresh adapter of either kind changes nothing, so all outputs are the backbone's
            for name, kind, same_as in (
                (frozen, "frozen", None), ("MGA adapters", "mga", frozen), ("LoRA (peft)", "lora", frozen)
            )
        ]  # fmt: skip
        groups.append(Group(f"CLIP ViT-B/16, 2 videos of {NUM_FRAMES} frames: {step}", contenders))
    return groups, []
