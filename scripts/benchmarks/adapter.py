"""Adapters: MGA in a frozen CLIP ViT-B/16 beside the bare backbone and LoRA of equal size."""

import functools

import torch
from transformers import CLIPVisionModel

from dmgal_hf.model.backbones import add_adapters

from .measuring import NUM_FRAMES, BenchmarkArguments, Contender, Group, Run
from .models import clip_config

ADAPTERS = {
    "mga": {},
    "lora": {"peft_type": "LORA", "budget": {}, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]},
}


def prepare_adapter(arguments: BenchmarkArguments, kind: str, training: bool) -> Run:
    """One support and one query video; a step of training is forward, backward and AdamW."""
    torch.manual_seed(0)
    model = CLIPVisionModel(clip_config(arguments.small)).requires_grad_(False).eval()
    note, size = "", model.config.image_size
    if kind in ADAPTERS:
        frozen = model.num_parameters()
        add_adapters(model, ADAPTERS[kind])
        count = model.num_parameters(only_trainable=True)
        note = f"{count:,} trainable, {count / frozen:.2%} of the backbone"
    model.to(arguments.device)
    pixel_values = torch.randn(2 * NUM_FRAMES, 3, size, size, generator=torch.Generator().manual_seed(1))
    pixel_values = pixel_values.to(arguments.device)
    facts = {"num_frames": NUM_FRAMES, "num_support": [1]} if kind == "mga" else {}
    learns = training and kind in ADAPTERS
    if learns:
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)

    def call():
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
