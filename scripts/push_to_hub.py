"""Uploads a finished run: `python scripts/push_to_hub.py --output_dir RUN --repo_id org/name [--private]
[--revision R] [--adapter_only] [--dry_run]`. The token is that of `hf auth login` or `HF_TOKEN`.
"""

from dataclasses import dataclass, field

from dmgal_hf.hub import push_to_hub
from dmgal_hf.training.arguments import parse_arguments


@dataclass
class PushArguments:
    """What goes where."""

    output_dir: str = field(metadata={"help": "Folder of a finished training run, or of any checkpoint."})
    repo_id: str = field(metadata={"help": "Repository: name or organisation/name."})
    private: bool = field(default=False, metadata={"help": "Only you can see the repository."})
    revision: str | None = field(default=None, metadata={"help": "Branch, by default main; made where there is none."})
    adapter_only: bool = field(
        default=False, metadata={"help": "Paradigm adapter: the adapters alone, for peft and the backbone they fit."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the list of files and the card, upload nothing."})


if __name__ == "__main__":
    (arguments,) = parse_arguments((PushArguments,))
    commit = push_to_hub(**vars(arguments))
    if commit is not None:
        print(commit.commit_url)
