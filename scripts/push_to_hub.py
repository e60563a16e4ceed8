"""Uploads a finished run: `python scripts/push_to_hub.py --output_dir RUN --repo_id org/name [--private]
[--revision R] [--adapter_only] [--dry_run]`. The token is that of `hf auth login` or `HF_TOKEN`.
"""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from dmgal_hf.hub import push_to_hub
from dmgal_hf.training.arguments import parse_arguments


@dataclass
class PushArguments:
    """What goes where."""

    output_dir: str = HfArg(help="Folder of a finished training run, or of any checkpoint.")
    repo_id: str = HfArg(help="Repository: name or organisation/name.")
    private: bool = HfArg(default=False, help="Only you can see the repository.")
    revision: str | None = HfArg(default=None, help="Branch, by default main; made where there is none.")
    adapter_only: bool = HfArg(
        default=False, help="Paradigm adapter: the adapters alone, for peft and the backbone they fit."
    )
    dry_run: bool = HfArg(default=False, help="Print the list of files and the card, upload nothing.")


if __name__ == "__main__":
    (arguments,) = parse_arguments((PushArguments,))
    commit = push_to_hub(**vars(arguments))
    if commit is not None:
        print(commit.commit_url)
