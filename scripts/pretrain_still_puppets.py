"""Trains a small ResNet or vision transformer to tell where the joints of puppets are on still pictures.

It sees poses but knows no motion: what a backbone trained on pictures is for real videos. It is the backbone of
scripts/configs/puppets_ft.yaml and, as a transformer, that of puppets_adapter.yaml.

python scripts/pretrain_still_puppets.py --output_dir runs/still_puppets_resnet
python scripts/pretrain_still_puppets.py --kind vit --output_dir runs/still_puppets_vit
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, CLIPVisionConfig, ResNetConfig, get_scheduler
from transformers.hf_argparser import HfArg

from dmgal_hf import DmgalVideoProcessor
from dmgal_hf.data.clip_looks import SIZE
from dmgal_hf.data.puppets import JOINTS, PRESETS, render_stills
from dmgal_hf.model.feature_maps import feature_maps, num_channels
from dmgal_hf.training.arguments import parse_arguments

PIXELS = 48  # a picture's height and width for the backbones below; both make 6 x 6 patches of it
BACKBONES = {
    "resnet": ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic"),
    "vit": CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=PIXELS,
        patch_size=8,
        projection_dim=96,
    ),
}


@dataclass
class PretrainArguments:
    """The backbone and its training."""

    output_dir: str = HfArg(default="runs/still_puppets_resnet", help="Folder for the backbone.")
    kind: str = HfArg(default="resnet", help="resnet or vit.")
    steps: int = HfArg(default=2000, help="Steps.")
    batch_size: int = HfArg(default=8, help="Figures a step, all different, of every preset in turn.")
    poses: int = HfArg(default=8, help="Pictures of a figure.")
    learning_rate: float = HfArg(default=2e-3, help="Highest learning rate.")
    num_workers: int = HfArg(default=1, help="Processes that draw pictures.")
    seed: int = HfArg(default=0, help="Of weights and pictures.")


class StillPuppets(Dataset):
    """Figures, endless and all different: pictures (poses, 3, PIXELS, PIXELS) and joints (poses, 20, 2), 0..1."""

    def __init__(self, presets: list[str], poses: int, processor: DmgalVideoProcessor, seed: int):
        self.presets, self.poses, self.processor, self.seed = presets, poses, processor, seed

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        preset = self.presets[index % len(self.presets)]
        pictures, joints = render_stills(preset, self.seed, index, self.poses)
        pixels = self.processor.resize_and_crop(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        return pixels, torch.from_numpy(joints / SIZE).float()


class JointFinder(nn.Module):
    """The backbone, and of every joint a map that is high in the patch where it lies."""

    def __init__(self, backbone: nn.Module, processor: DmgalVideoProcessor):
        super().__init__()
        self.backbone, self.processor = backbone, processor
        self.head = nn.Linear(num_channels(backbone.config), len(JOINTS))

    def forward(self, pixels: torch.Tensor, joints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(figures, poses, 3, h, w) and (figures, poses, 20, 2) -> the loss, the share of joints found."""
        pixels, joints = self.processor.normalize(pixels).flatten(0, 1), joints.flatten(0, 1)
        maps = feature_maps(self.backbone, pixels, (1, 1, len(pixels)), None)[0][0, 0]  # (pictures, C, rows, columns)
        rows, columns = maps.shape[-2:]
        logits = self.head(maps.flatten(2).transpose(1, 2))  # (pictures, patches, 20)
        column, row = (joints * joints.new_tensor([columns, rows])).floor().long().unbind(-1)
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        patch = torch.where(inside, row * columns + column, -100)  # which cross_entropy leaves out
        found = (logits.argmax(1) == patch)[inside].float().mean()
        return F.cross_entropy(logits, patch), found


def main(arguments: PretrainArguments):
    if arguments.kind not in BACKBONES:
        raise ValueError(f"kind must be one of {', '.join(BACKBONES)}, got {arguments.kind!r}.")
    set_seed(arguments.seed)
    processor = DmgalVideoProcessor(size=PIXELS, crop_size=PIXELS)
    backbone = AutoModel.from_config(BACKBONES[arguments.kind])
    finder = JointFinder(backbone, processor)
    optimizer = torch.optim.AdamW(finder.parameters(), arguments.learning_rate, weight_decay=0.05)
    scheduler = get_scheduler("cosine", optimizer, arguments.steps // 10, arguments.steps)

    def batches(presets: list[str], seed: int, steps: int) -> DataLoader:
        data = StillPuppets(presets, arguments.poses, processor, seed)
        numbers = range(steps * arguments.batch_size)
        return DataLoader(data, arguments.batch_size, sampler=numbers, num_workers=arguments.num_workers)

    bar = tqdm(batches(list(PRESETS), arguments.seed, arguments.steps), desc="Training on still pictures")
    for pixels, joints in bar:
        loss, _ = finder(pixels, joints)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(finder.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    finder.eval()
    backbone.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    with torch.no_grad():
        for preset in PRESETS:
            found = [finder(*batch)[1] for batch in batches([preset], arguments.seed + 1, 16)]
            print(f"on new pictures of {preset} it puts {100 * torch.stack(found).mean():.1f} % of the joints right")
    print(f"wrote {arguments.output_dir}")


if __name__ == "__main__":
    main(*parse_arguments((PretrainArguments,)))
