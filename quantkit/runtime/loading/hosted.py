"""Networks that the lean decoder does not know: Transformers' own modules, filled tensor by tensor.

The module is built without memory (meta device); its linear layers and experts are replaced, its
other parameters read one at a time, and the buffers that no file holds (rotary frequencies) are
computed by the model's own initialisation.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.backends.adapters.hf_config import auto_class
from quantkit.checkpoint.network.config import is_tied
from quantkit.checkpoint.network.modules import CONTROLS, fused_groups
from quantkit.checkpoint.network.multimodal import language_model
from quantkit.checkpoint.progress import Progress
from quantkit.errors import InputError
from quantkit.runtime.loading.cache_scales import cache_scales
from quantkit.runtime.loading.experts import find_experts, replace_experts, router_widths
from quantkit.runtime.loading.make_layers import LayerMaker
from quantkit.runtime.loading.memory import release
from quantkit.runtime.loading.names import FileNames
from quantkit.runtime.network.cache_rounding import CacheRule


class HostedNetwork(nn.Module):
    """A Transformers model that continues text behind the lean decoder's interface."""

    def __init__(self, model: Any, cache_rules: Mapping[int, CacheRule]) -> None:
        super().__init__()
        self.model = model
        self.embed: torch.Tensor = model.get_input_embeddings().weight
        self.cache_rules = dict(cache_rules)

    def new_cache(self, batch: int, capacity: int) -> Any:  # noqa: ARG002
        """An empty Transformers cache, which grows by itself; the family's own where it has one."""
        from transformers import DynamicCache

        if self.cache_rules:
            return rounding_cache(self.model.config, self.cache_rules)
        own = own_cache(self.model)
        return own() if own else DynamicCache(config=self.model.config)

    def forward(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        keep: int = 0,
        pictures: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """See `Decoder.forward`; keys and values are rounded as they enter a cache. `pictures` are
        other arguments, which come to the device, numbers with a point in the model's dtype."""
        if cache is None and self.cache_rules:
            cache = self.new_cache(ids.shape[0], ids.shape[1])
        result = self.model(
            input_ids=ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
            **{name: self._placed(value) for name, value in (pictures or {}).items()},
        )
        logits: torch.Tensor = result.logits
        return logits

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        dtype = self.embed.dtype if value.is_floating_point() else None
        return value.to(self.embed.device, dtype)


def build_hosted(config: Any, maker: LayerMaker, progress: Progress | None = None) -> HostedNetwork:
    """Transformers' model of a config, with the checkpoint's layers in it; raises InputError."""
    model = empty_model(config, maker.source.checkpoint.path, maker.dtype)
    rules = cache_scales(maker.source, config)
    if rules and own_cache(model) is not None:
        raise InputError(
            f"{maker.source.checkpoint.path} declares a quantized key-value cache, and that of "
            f"{config.model_type} is not computed so.",
            hint="quantkit validate DIR --engine vllm, or quantize with kv_cache=none",
            code="runtime.cache",
        )
    names = FileNames(model, maker.source)
    _compute_buffers(model, maker.device)
    replace_layers(model, maker, names, progress=progress)
    fill_parameters(model, maker, names)
    return HostedNetwork(model.eval(), rules)


def own_cache(model: Any) -> type | None:
    """The cache class that a family of Transformers brings itself."""
    from transformers import DynamicCache

    family = vars(sys.modules[type(model).__module__]).values()
    own = (kind for kind in family if isinstance(kind, type) and DynamicCache in kind.__bases__)
    return next(own, None)


def rounding_cache(config: Any, rules: Mapping[int, CacheRule]) -> Any:
    """An empty Transformers cache that keys and values go into through the rules of their layer."""
    from transformers import DynamicCache

    class RoundingCache(DynamicCache):
        def update(
            self,
            key_states: torch.Tensor,
            value_states: torch.Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rule = rules.get(layer_idx)
            if rule is not None:
                key_states, value_states = rule.through(key_states, value_states)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    return RoundingCache(config=config)


def empty_model(config: Any, path: Path, dtype: torch.dtype) -> Any:
    """Transformers' model of a config on the meta device; InputError for a network that cannot be
    computed: none that continues text, or experts kept in no known way."""
    try:
        with torch.device("meta"):
            model: Any = auto_class(config).from_config(config, dtype=dtype)
    except ValueError as error:
        raise InputError(
            f"Transformers has no causal language model for {path}: {str(error).splitlines()[0]}",
            hint="only models that continue text can be run",
            code="runtime.architecture",
        ) from error
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"Transformers cannot build the model of {path}: {type(error).__name__}: {error}",
            hint="check the values of config.json, rope_parameters and rope_scaling among them",
            code="runtime.architecture",
        ) from error
    find_experts(model)
    return model


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Give every buffer that is in no file its value; one that stays unset is an error."""
    owners = {}
    for name, buffer in model.named_non_persistent_buffers():
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        unset = torch.nan if buffer.is_floating_point() else 0
        owner.register_buffer(
            leaf, torch.full(buffer.shape, unset, dtype=buffer.dtype, device=device), False
        )
        owners[name] = owner
    for owner, holder in {owner: _holder(model, name) for name, owner in owners.items()}.items():
        holder._init_weights(owner)
    for name, owner in owners.items():
        value = owner.get_buffer(name.rpartition(".")[2])
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                f"Transformers does not say how the buffer {name} is computed.",
                hint="upgrade transformers",
                code="runtime.architecture",
            )


def _holder(model: Any, name: str) -> Any:
    """The innermost model around a buffer: a tower has an initialisation of its own."""
    from transformers import PreTrainedModel

    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts))]
    return [module for module in around if isinstance(module, PreTrainedModel)][-1]


def replace_layers(
    model: Any,
    maker: LayerMaker,
    names: FileNames,
    part: str = "",
    progress: Progress | None = None,
) -> None:
    """Put our layers in the place of the linear layers and experts that begin with `part`."""
    every = find_experts(model)
    experts = {name: module for name, module in every.items() if name.startswith(part)}
    found = _linears(model, maker, names, router_widths(every))
    linears = {name: module for name, module in found.items() if name.startswith(part)}
    groups = {members[0]: members for members in fused_groups(linears)}
    grouped = {name for members in groups.values() for name in members[1:]}
    heads = [name for name in linears if name not in grouped]
    total = len(heads) + len(experts)
    for index, name in enumerate(heads):
        members = list(groups.get(name, (name,)))
        shapes = [(linears[m].out_features, linears[m].in_features) for m in members]
        has_bias = linears[name].bias is not None
        made = maker.separate([names.module(member) for member in members], shapes, has_bias)
        for member, module in zip(members, made, strict=True):
            model.set_submodule(member, module)
        release()
        if progress is not None:
            progress(index + 1, total)
    for index, _ in enumerate(replace_experts(model, experts, maker, names), len(heads)):
        if progress is not None:
            progress(index + 1, total)


def _linears(
    model: Any, maker: LayerMaker, names: FileNames, widths: set[int]
) -> dict[str, nn.Linear]:
    """The linear layers to replace. Routers and the like, and towers and projectors, stay as they
    are where they are in 16 bit: what holds them may use their weight itself."""
    head = model.get_output_embeddings()
    language = language_model(maker.source.checkpoint.shapes, maker.source.checkpoint.config)
    found = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            stored = names.module(name)
            small = module.out_features in widths or name.rpartition(".")[2] in CONTROLS
            outside = language is not None and not stored.startswith(language.blocks)
            if not (small or outside) or stored in maker.source.layers:
                found[name] = module
    return found


def fill_parameters(model: Any, maker: LayerMaker, names: FileNames, part: str = "") -> None:
    """What is still on the meta device of what begins with `part` (everything: embeddings, norms,
    routers); then the output head, where it does."""
    source = maker.source
    head = model.get_output_embeddings()
    head_name = next((n for n, module in model.named_modules() if module is head), None)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in state.items():
        wanted = value.is_meta and name.startswith(part)
        if not wanted or name.rpartition(".")[0] == head_name:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        tensor = names.read(name, tuple(value.shape), value.dtype).to(maker.device)
        if isinstance(value, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(owner, name.rpartition(".")[2], tensor)
    if head_name is None or not head_name.startswith(part):
        return
    embedding = model.get_input_embeddings().weight
    stored = names.module(head_name)
    if stored in source.layers or not is_tied(source.checkpoint.config):
        shape = (head.out_features, head.in_features)
        made: nn.Module = maker.linear(stored, shape, head.bias is not None)
    else:
        source.used.add(f"{stored}.weight")
        whole = (head.out_features, head.in_features)
        made = maker.plain([stored], [whole], embedding.detach(), None)
    model.set_submodule(head_name, made)
