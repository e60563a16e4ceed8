"""Checkpoints on the Hugging Face Hub: what is uploaded, and how."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from peft import get_peft_model_state_dict
from safetensors.torch import save
from transformers.dynamic_module_utils import custom_object_save

from ..model.class_texts import TEXT_FOLDER
from ..model.configuration_dmgal import DmgalConfig
from ..model.modeling_dmgal import DmgalModel
from ..model.video_processing_dmgal import DmgalVideoProcessor
from .cards import checkpoint_folder, find_base_model, read_mapping, render_model_card, repository_name

# Which classes `trust_remote_code=True` loads without dmgal_hf, by the file that says so.
_CODE = {
    DmgalConfig: "configuration_dmgal.DmgalConfig",
    DmgalModel: "modeling_dmgal.DmgalModel",
    DmgalVideoProcessor: "video_processing_dmgal.DmgalVideoProcessor",
}
AUTO_MAPS = {
    "config.json": {"AutoConfig": _CODE[DmgalConfig], "AutoModel": _CODE[DmgalModel]},
    "preprocessor_config.json": {
        "AutoProcessor": _CODE[DmgalVideoProcessor],
        "AutoImageProcessor": _CODE[DmgalVideoProcessor],
    },
}
# Any other JSON file in the folder is somebody else's.
JSON_FILES = (
    "config.json", "preprocessor_config.json", "adapter_config.json", "metrics.json", "model.safetensors.index.json",
)  # fmt: skip
PUBLISHED_JSON = JSON_FILES[:4]  # the index of the weights stays as it is


def collect_files(
    output_dir: str | os.PathLike, repo_id: str | None = None, adapter_only: bool = False
) -> dict[str, Path | bytes]:
    """
    What a checkpoint's repository is made of: the folder's own safetensors and JSON files, the source that
    `trust_remote_code` needs, and the card. Everything else stays where it is: resumable states, logs, pickles,
    `config.yaml` (its content is on the card), whatever else was put into the folder.

    Args:
        output_dir (`str` or `os.PathLike`): folder of a training run, or of any checkpoint of [`DmgalModel`] or of an
            adapter.
        repo_id (`str`, *optional*): where it goes, for the card.
        adapter_only (`bool`, *optional*, defaults to `False`): of a checkpoint with adapters inside, only these, as
            peft saves adapters of the bare backbone; `PeftModel.from_pretrained(backbone, repo_id)` reads them.

    Returns:
        `dict[str, Path | bytes]`: name in the repository -> file, or content where it differs from the folder's.

    Raises:
        FileNotFoundError: there is no such folder, no checkpoint in it, or no safetensors file.
        ValueError: a file is damaged, or the checkpoint is of another kind or of a newer format than this release;
            with `adapter_only`, it has no adapters inside, or its backbone is not known by the name of a repository.
    """
    folder = checkpoint_folder(output_dir)
    files: dict[str, Path | bytes] = {
        path.name: path
        for pattern in ("*.safetensors", *JSON_FILES)
        for path in sorted(folder.glob(pattern))
        if not path.name.startswith(".")
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise FileNotFoundError(
            f"{folder} holds no weights (*.safetensors): let the training finish, or save the model there by "
            "save_pretrained"
        )
    if "config.json" in files:
        _check_config(folder)
        files |= {f"{TEXT_FOLDER}/{path.name}": path for path in _text_tower(folder)}
    has_source = "config.json" in files and not adapter_only
    files |= {name: _public_json(files[name], has_source) for name in PUBLISHED_JSON if name in files}
    if has_source:
        files |= _source_files()
    elif "config.json" in files:
        kept = ("preprocessor_config.json", "metrics.json")
        files = _extract_adapters(folder) | {name: files[name] for name in kept if name in files}
    files["README.md"] = str(render_model_card(folder, repo_id, adapter_only)).encode()
    return files


def push_to_hub(
    output_dir: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    adapter_only: bool = False,
) -> CommitInfo | None:
    """
    Uploads a checkpoint in one commit; see [`collect_files`] for what goes up. The repository and the branch are
    created where they do not exist.

    Args:
        output_dir (`str` or `os.PathLike`): folder of a finished training run.
        repo_id (`str`): "name" or "organisation/name".
        private (`bool`, *optional*, defaults to `False`): whether only you can see the repository.
        revision (`str`, *optional*): branch to push to, by default "main".
        dry_run (`bool`, *optional*, defaults to `False`): print the list of files and the card, and upload nothing.
        token (`str`, *optional*): by default that of `hf auth login` or `HF_TOKEN`.
        adapter_only (`bool`, *optional*, defaults to `False`): of a checkpoint with adapters inside, only these.

    Returns:
        `huggingface_hub.CommitInfo`, or `None` after a dry run.

    Raises:
        FileNotFoundError, ValueError: as [`collect_files`]; and `ValueError` where `private` is asked for a repository
            that is public, or the Hub refuses the card.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses the token, the name or the upload.
    """
    files = collect_files(output_dir, repo_id, adapter_only)
    if dry_run:
        print(_describe(files))
        return None
    api = HfApi(token=token, library_name="dmgal_hf")
    repo_id = create_repo(api, repo_id, "model", private)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    return api.create_commit(repo_id, operations, commit_message="Upload DMGAL checkpoint", revision=revision)


def create_repo(api: HfApi, repo_id: str, repo_type: str, private: bool) -> str:
    """Its full name; one that is there already stays as it is."""
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or push without private")
    return repo_id


def _text_tower(folder: Path) -> list[Path]:
    """Its files, where the checkpoint brings it. Raises `ValueError` where it has no name that others could load."""
    config = read_mapping(folder / "config.json")
    name = config.get("text_model")
    if not config.get("text_guidance"):
        return []
    if name is not None and repository_name(name) is None:
        raise ValueError(
            f"the text tower of {folder} lies in {name}, where nobody else finds it: save the model with "
            "save_pretrained(..., with_text_tower=True), or set text_model in config.json to an id on the Hub"
        )
    kept = (".safetensors", ".json", ".txt", ".model")
    return [] if name else [path for path in sorted((folder / TEXT_FOLDER).iterdir()) if path.suffix in kept]


def _check_config(folder: Path):
    model_type = read_mapping(folder / "config.json").get("model_type")
    if model_type != DmgalConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, not {DmgalConfig.model_type!r}")
    DmgalConfig.from_pretrained(folder)


def _source_files() -> dict[str, bytes]:
    """The modules of this package that the classes of a checkpoint need, by transformers' own search."""
    with TemporaryDirectory() as folder:
        paths = [path for code in _CODE for path in custom_object_save(code, folder)]
        return {path.name: path.read_bytes() for path in sorted(set(paths))}


def _public_json(path: Path, has_source: bool) -> bytes:
    """A JSON file without paths of this machine, and with a map to the source where that lies beside it."""
    content = read_mapping(path)
    content.pop("auto_map", None)
    if has_source and path.name in AUTO_MAPS:
        content["auto_map"] = AUTO_MAPS[path.name]
    backbone = content.get("backbone_config", {})
    if "_name_or_path" in backbone:
        backbone["_name_or_path"] = repository_name(backbone["_name_or_path"]) or ""
    if "base_model_name_or_path" in content:
        content["base_model_name_or_path"] = repository_name(content["base_model_name_or_path"])
    training = content.get("training", {})
    if "broken_videos" in training:  # others need to know which, not where
        training["broken_videos"] = [Path(name).name for name in training["broken_videos"]]
    return (json.dumps(content, indent=2) + "\n").encode()


def _extract_adapters(folder: Path) -> dict[str, bytes]:
    """The adapters inside a checkpoint of [`DmgalModel`], as peft's save_pretrained writes those of its backbone."""
    config, arguments = read_mapping(folder / "config.json"), read_mapping(folder / "config.yaml")
    if config.get("adapter_config") is None:
        raise ValueError(
            f"{folder} has no adapters inside (paradigm {config.get('paradigm')!r}, no adapter_config): push it "
            "without adapter_only"
        )
    base_model = find_base_model({}, config, arguments)
    if base_model is None:
        raise ValueError(
            f"the backbone of {folder} ({arguments.get('backbone')!r}) is not named after a repository, and nobody "
            "could load adapters without it: push the whole checkpoint, without adapter_only"
        )
    backbone = DmgalModel.from_pretrained(folder).backbone
    adapter_config = backbone.peft_config["default"]
    adapter_config.base_model_name_or_path, adapter_config.inference_mode = base_model, True
    weights = {f"base_model.model.{name}": weight for name, weight in get_peft_model_state_dict(backbone).items()}
    with TemporaryDirectory() as saved:
        adapter_config.save_pretrained(saved)
        content = (Path(saved) / "adapter_config.json").read_bytes()
    return {"adapter_model.safetensors": save(weights, metadata={"format": "pt"}), "adapter_config.json": content}


def _describe(files: dict[str, Path | bytes]) -> str:
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    lines = [f"{size:>14,}  {name}" for name, size in sizes.items()]
    lines.append(f"{sum(sizes.values()):>14,}  bytes in {len(files)} files")
    return "\n".join(lines) + "\n\n" + files["README.md"].decode()
