"""Trains a tiny CLIP-style vision transformer to tell shapes and textures on still pictures.

It sees but knows no motion: the frozen backbone for scripts/configs/motion_shapes_adapter.yaml.

python scripts/pretrain_still_shapes.py --output_dir runs/still_shapes_backbone
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, get_scheduler
from transformers.hf_argparser import HfArg

from dmgal_hf import DmgalVideoProcessor
from dmgal_hf.data.motion_shapes import SHAPES, TEXTURES, render_still
from dmgal_hf.training.arguments import parse_arguments


@dataclass
class PretrainArguments:
    """The backbone and its training."""

    output_dir: str = HfArg(default="runs/still_shapes_backbone", help="Folder for the backbone.")
    preset: str = HfArg(default="plain", help="Motion shapes: plain or textured.")
    steps: int = HfArg(default=1500, help="Steps.")
    batch_size: int = HfArg(default=64, help="Pictures a step, all different.")
    learning_rate: float = HfArg(default=2e-3, help="Highest learning rate.")
    num_workers: int = HfArg(default=1, help="Processes that draw pictures.")
    seed: int = HfArg(default=0, help="Of weights and pictures.")


class StillShapes(Dataset):
    """Pictures, endless and all different, each with the numbers of its shape and its texture."""

    def __init__(self, arguments: PretrainArguments, processor: DmgalVideoProcessor, seed: int):
        self.preset, self.processor, self.seed = arguments.preset, processor, seed

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        picture, shape, texture = render_still(self.preset, self.seed, index)
        pixels = self.processor.resize_and_crop(torch.from_numpy(picture).permute(2, 0, 1)[None])[0]
        return pixels, list(SHAPES).index(shape), list(TEXTURES).index(texture)


def main(arguments: PretrainArguments):
    set_seed(arguments.seed)
    processor = DmgalVideoProcessor(size=48, crop_size=48, image_mean=0.5, image_std=0.5)
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=48,
        patch_size=8,
        projection_dim=96,
    )
    backbone = CLIPVisionModel(config)
    heads = nn.Linear(config.hidden_size, len(SHAPES) + len(TEXTURES))
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, arguments.learning_rate, weight_decay=0.05)
    scheduler = get_scheduler("cosine", optimizer, arguments.steps // 10, arguments.steps)

    def batches(seed: int, steps: int) -> DataLoader:
        data = StillShapes(arguments, processor, seed)
        numbers = range(steps * arguments.batch_size)
        return DataLoader(data, arguments.batch_size, sampler=numbers, num_workers=arguments.num_workers)

    def predict(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = heads(backbone(pixel_values=processor.normalize(pixels)).pooler_output)
        return logits.split([len(SHAPES), len(TEXTURES)], -1)

    bar = tqdm(batches(arguments.seed, arguments.steps), desc="Training on still pictures")
    for pixels, shape, texture in bar:
        shape_logits, texture_logits = predict(pixels)
        loss = F.cross_entropy(shape_logits, shape) + F.cross_entropy(texture_logits, texture)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    backbone.eval()
    right = torch.zeros(2)
    with torch.no_grad():
        for pixels, shape, texture in batches(arguments.seed + 1, 16):
            shape_logits, texture_logits = predict(pixels)
            right += torch.stack(
                [(shape_logits.argmax(-1) == shape).sum(), (texture_logits.argmax(-1) == texture).sum()]
            )
    shape_accuracy, texture_accuracy = (100 * right / (16 * arguments.batch_size)).tolist()
    backbone.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    print(
        f"wrote {arguments.output_dir}: on new pictures it names the shape in {shape_accuracy:.1f} % and the texture "
        f"in {texture_accuracy:.1f} %"
    )


if __name__ == "__main__":
    main(*parse_arguments((PretrainArguments,)))
