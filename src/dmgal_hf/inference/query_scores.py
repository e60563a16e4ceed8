"""What a fitted classifier makes of queries; on one GPU it is replayed as a CUDA graph."""

import threading

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..model.kept_supports import DmgalSupport
from ..model.modeling_dmgal import DmgalModel
from ..model.modeling_mga import EpisodeFactsCarrier

PLAIN = (torch.Tensor, nn.Parameter)  # not quantised, not sharded
# What nn.Module itself has of lists, without those that a forward pass reads; weights are looked at one by one.
UNREAD = vars(nn.Module()).keys() - {"_modules", "_forward_hooks", "_forward_pre_hooks"}


def score_queries(
    model: DmgalModel, support: DmgalSupport, text_embeds: torch.Tensor | None, pixel_values: torch.Tensor
) -> torch.Tensor:
    """
    Queries (Q, T, 3, H, W) -> (Q, 1, N) float32: logits by clips. With `text_embeds` (N, E) it is (Q, 2, N), with
    log-probabilities by text.
    """
    output = model(query_pixel_values=pixel_values[None], support=support)
    scores = [output.logits[0].float()]
    if text_embeds is not None:
        scores.append(model.text_logits(output.query_embeds[0], text_embeds).log_softmax(-1))
    return torch.stack(scores, 1)


class QueryScores:
    """
    [`score_queries`], replayed as a CUDA graph where that is safe, one for each number of queries that comes again.
    Whatever changes of the model, and other supports, call for new graphs.

    Everything else runs plainly: another device, a model that lies on several, trains, is compiled or has hooks of the
    caller, and calls under autocast, in inference mode or on a stream of their own. A copy starts without graphs.
    """

    def __init__(self):
        from ..data.cuda_graphs import ReplayedCall  # `data` imports datasets, which takes longer than all the rest

        self.lock = threading.Lock()  # the graphs of all threads read and write the same memory
        self.scored: _Scored | None = None
        self.replayed = ReplayedCall(lambda inputs: (self.scored(**inputs),), context=lambda: self.scored)

    def __reduce__(self):
        return type(self), ()

    def __call__(
        self,
        model: DmgalModel,
        support: DmgalSupport,
        text_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor,
    ) -> torch.Tensor:
        """Arguments and result of [`score_queries`], without gradients."""
        if not self.replayed.failed and may_replay(pixel_values.device):
            with self.lock:
                if self.scored is None or not self.scored.is_still(model, support, text_embeds):
                    self.scored = _Scored(model, support, text_embeds)
                if self.scored.device == pixel_values.device:
                    return self.replayed({"pixel_values": pixel_values})[0]
        return score_queries(model, support, text_embeds, pixel_values)


def may_replay(device: torch.device) -> bool:
    """Whether calls on this device are on its usual stream, and in no mode that a replay would not see."""
    if device.type != "cuda" or torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


class _Scored:
    """
    A model with kept supports, and all that its forward pass depends on: addresses of the weights, modules and their
    attributes, hooks, fields of the configs.

    `device` is the one that all of it lies on; `None` where it may not be replayed.
    """

    def __init__(self, model: DmgalModel, support: DmgalSupport, text_embeds: torch.Tensor | None):
        self.model, self.support, self.text_embeds = model, support, text_embeds
        parts = list(model.modules())
        self.registries = [registry for part in parts for registry in (part._parameters, part._buffers)]
        attributes = [item for part in parts for item in vars(part).items() if item[0] not in UNREAD]
        state = [support.states, *map(vars, parts)]
        state += [vars(value) for _, value in attributes if isinstance(value, PreTrainedConfig)]
        state += [value for _, value in attributes if isinstance(value, (dict, list, set))]
        self.state = list({id(one): one for one in state}.values())
        self.state_before = [one.copy() for one in self.state]
        self.weights = self._weights()
        device = support.features.device
        in_place = all(kind in PLAIN and place == device for kind, place, *_ in self.weights)
        self.device = device if in_place and all(map(_is_plain, parts)) else None

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return score_queries(self.model, self.support, self.text_embeds, pixel_values)

    def is_still(self, model: DmgalModel, support: DmgalSupport, text_embeds: torch.Tensor | None) -> bool:
        """Whether nothing has changed. Values in place may have: a replay sees them."""
        if model is not self.model or support is not self.support or text_embeds is not self.text_embeds:
            return False
        try:  # what is the same object is the same, and equal things are
            return self.state == self.state_before and self._weights() == self.weights
        except (RuntimeError, ValueError):  # tensors or arrays that were replaced have no single truth
            return False

    def _weights(self) -> list[tuple]:
        weights = (one for registry in self.registries for one in registry.values() if one is not None)
        return [(type(one), one.device, one.dtype, type(one) in PLAIN and one.data_ptr()) for one in weights]


def _is_plain(part: nn.Module) -> bool:
    """Neither in training, nor compiled, offloaded or changed in another way that replaces its forward, nor hooked."""
    hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
    ours = all(isinstance(getattr(hook, "__self__", None), EpisodeFactsCarrier) for hook in hooks)
    return ours and not part.training and "forward" not in vars(part) and part._compiled_call_impl is None
