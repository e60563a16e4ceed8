"""What a pass through the model returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class DmgalOutput(ModelOutput):
    """
    Output of [`DmgalModel`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Cross entropy of the logits, mean over all queries of all episodes.
        logits (`torch.FloatTensor` of shape `(B, Q, N)`):
            Scores of the N classes of the episode: minus the mean distance to the supports of the class. With
            `text_embeds` those of [`combined_logits`].
        support_features (`torch.FloatTensor` of shape `(B, S, T, D)`):
            Frame descriptors of the supports, as matched.
        query_features (`torch.FloatTensor` of shape `(B, Q, T, D)`):
            Frame descriptors of the queries, as matched.
        attentions (`dict[str, torch.FloatTensor]`, *optional*, returned with `output_attentions=True`):
            `query_self` `(B, Q, T, P, P)` and, unless kept supports were given, `support_self` `(B, S, T, P, P)` of
            S-MGA; `cross` `(B, Q, T, P, S, P)` of C-MGA; all averaged over the directions, P patches a frame.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned with `output_hidden_states=True`):
            Feature maps of the queries, `(B, Q, T, C, H, W)`: from the backbone, after S-MGA, after the mixer.
        text_logits (`torch.FloatTensor` of shape `(B, Q, N)`, *optional*, returned with `text_embeds`):
            Scores by text alone: scale · cosine + bias, as the pair of towers has learnt them.
        support_embeds (`torch.FloatTensor` of shape `(B, S, E)`, *optional*, returned with `text_guidance`):
            Mean projected frame embedding of each support, to be compared with texts.
        query_embeds (`torch.FloatTensor` of shape `(B, Q, E)`, *optional*, returned with `text_guidance`):
            The same of the queries.

    Example:

    ```python
    >>> import torch
    >>> from dmgal_hf import DmgalOutput

    >>> output = DmgalOutput(logits=torch.tensor([[[-3.0, -1.0]]]))  # one query, two classes
    >>> output.logits.argmax(-1).tolist()
    [[1]]
    ```
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    support_features: torch.FloatTensor | None = None
    query_features: torch.FloatTensor | None = None
    attentions: dict[str, torch.FloatTensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_logits: torch.FloatTensor | None = None
    support_embeds: torch.FloatTensor | None = None
    query_embeds: torch.FloatTensor | None = None
