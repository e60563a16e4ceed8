"""The query side of a [`DmgalModel`] with its supports built in: what is compiled, exported and deployed."""

import torch
from torch import nn

from ..model.class_texts import combined_logits
from ..model.modeling_dmgal import DmgalModel, DmgalSupport


class DmgalQueryModel(nn.Module):
    """
    Query videos in, logits out: a [`DmgalModel`] in eval mode and one kept support set, whose tensors are buffers.

    Its forward pass has one input, one output and no branch that depends on values, so that `torch.compile` and
    `torch.export` take it whole:

    ```python
    >>> import torch
    >>> from transformers import ResNetConfig
    >>> from dmgal_hf import DmgalConfig, DmgalModel, DmgalQueryModel

    >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    >>> model = DmgalModel(DmgalConfig(backbone_config=backbone)).eval()
    >>> support = model.encode_support(torch.randn(1, 2, 8, 3, 64, 64), torch.tensor([[0, 1]]))
    >>> queries = DmgalQueryModel(model, support)  # what clf.query_model() gives
    >>> pixel_values = torch.randn(3, 8, 3, 64, 64)
    >>> queries(pixel_values).shape
    torch.Size([3, 2])
    >>> videos = torch.export.Dim("videos", min=1, max=64)  # any number of queries a call
    >>> program = torch.export.export(queries, (pixel_values,), dynamic_shapes=({0: videos},))
    >>> torch.export.save(program, "queries.pt2")
    ```

    The program goes to ONNX as it is: `torch.onnx.export(queries, (pixel_values,), "queries.onnx", dynamo=True)`, with
    `pip install onnx onnxscript`.

    Args:
        model ([`DmgalModel`] or `PeftModel` of one): the model; it is put into eval mode and shared, not copied.
        support ([`DmgalSupport`]): kept supports of one episode.
        text_embeds (`torch.FloatTensor` of shape `(N, E)`, *optional*): prototypes by text: the logits are then those
            of [`combined_logits`], with the next two arguments, by default those of the model's config.
        temperature (`float`, *optional*): scores are softmax(logits / temperature).
        text_weight (`float`, *optional*): of the text.

    Raises:
        ValueError: the supports are those of several episodes.
    """

    def __init__(
        self,
        model: DmgalModel,
        support: DmgalSupport,
        text_embeds: torch.Tensor | None = None,
        temperature: float | None = None,
        text_weight: float | None = None,
    ):
        super().__init__()
        if len(support.features) != 1:
            raise ValueError(
                f"the supports are those of {len(support.features)} episodes, and a DmgalQueryModel has one"
            )
        self.model = model
        self.eval()
        self.way = support.way
        self.register_buffer("features", support.features)
        self.register_buffer("labels", support.labels)
        self.register_buffer("text_embeds", text_embeds)
        self.temperature = model.config.score_temperature if temperature is None else temperature
        self.text_weight = model.config.text_weight if text_weight is None else text_weight
        self.state_names = list(support.states)  # buffers have no dots in their names
        for number, name in enumerate(self.state_names):
            self.register_buffer(f"state_{number}", support.states[name])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(Q, T, 3, H, W)` floating, as the processor gives them -> logits `(Q, N)` float32."""
        states = {name: getattr(self, f"state_{number}") for number, name in enumerate(self.state_names)}
        support = DmgalSupport(self.features, self.labels, self.way, states)
        pixel_values = pixel_values.to(self.model.dtype)[None]
        output = self.model(query_pixel_values=pixel_values, support=support)
        if self.text_embeds is None:
            return output.logits[0]
        by_text = self.model.text_logits(output.query_embeds[0], self.text_embeds).log_softmax(-1)
        return combined_logits(output.logits[0], by_text, self.temperature, self.text_weight)
