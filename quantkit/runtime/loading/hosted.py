"""Networks that the lean decoder does not know: Transformers' own modules, filled tensor by tensor.

The module is built without memory (meta device); its linear layers are replaced, its parameters
read one at a time, and the buffers that no file holds (rotary frequencies) are computed by the
model's own initialisation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.network.config import is_tied
from quantkit.checkpoint.network.modules import fused_groups
from quantkit.checkpoint.progress import Progress
from quantkit.errors import InputError
from quantkit.runtime.linear.modules import PlainLinear
from quantkit.runtime.loading.make_layers import LayerMaker
from quantkit.runtime.loading.memory import release

_FILE_HEADS = ("embed_out",)
"""What heads are called in files beside their names in Transformers (GPT-NeoX, Pythia)."""


class HostedNetwork(nn.Module):
    """A Transformers causal language model behind the lean decoder's interface."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.embed: torch.Tensor = model.get_input_embeddings().weight

    def new_cache(self, batch: int, capacity: int) -> Any:  # noqa: ARG002
        """An empty Transformers cache, which grows by itself."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def forward(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        keep: int = 0,
    ) -> torch.Tensor:
        """See `Decoder.forward`."""
        result = self.model(
            input_ids=ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = result.logits
        return logits


def build_hosted(config: Any, maker: LayerMaker, progress: Progress | None = None) -> HostedNetwork:
    """Transformers' model of a config, with the checkpoint's layers in it; raises InputError."""
    model = empty_model(config, maker.source.checkpoint.path, maker.dtype)
    _compute_buffers(model, maker.device)
    _replace_linears(model, maker, progress)
    _fill_parameters(model, maker)
    return HostedNetwork(model.eval())


def empty_model(config: Any, path: Path, dtype: torch.dtype) -> Any:
    """Transformers' model of a config on the meta device; InputError for a network that cannot be
    computed: none that continues text, or a mixture of experts."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
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
    for name, weight in model.named_parameters():
        if weight.dim() == 3 and "expert" in name:
            raise InputError(
                f"{path} is a mixture of experts ({name}), which the runtime does not compute.",
                hint="quantkit validate DIR --engine vllm",
                code="runtime.architecture",
            )
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
    for owner in dict.fromkeys(owners.values()):
        model._init_weights(owner)
    for name, owner in owners.items():
        value = owner.get_buffer(name.rpartition(".")[2])
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                f"Transformers does not say how the buffer {name} is computed.",
                hint="upgrade transformers",
                code="runtime.architecture",
            )


def _replace_linears(model: Any, maker: LayerMaker, progress: Progress | None) -> None:
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    groups = {members[0]: members for members in fused_groups(linears)}
    grouped = {name for members in groups.values() for name in members[1:]}
    names = [name for name in linears if name not in grouped]
    for index, name in enumerate(names):
        members = list(groups.get(name, (name,)))
        shapes = [(linears[m].out_features, linears[m].in_features) for m in members]
        has_bias = linears[name].bias is not None
        made = maker.separate(members, shapes, has_bias)
        for member, module in zip(members, made, strict=True):
            model.set_submodule(member, module)
        release()
        if progress is not None:
            progress(index + 1, len(names))


def _fill_parameters(model: Any, maker: LayerMaker) -> None:
    """Embeddings, norms and whatever else is still on the meta device; then the output head."""
    source = maker.source
    head = model.get_output_embeddings()
    head_name = next((n for n, module in model.named_modules() if module is head), None)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in state.items():
        if not value.is_meta or name.rpartition(".")[0] == head_name:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        tensor = source.plain(name, tuple(value.shape), value.dtype).to(maker.device)
        if isinstance(value, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(owner, name.rpartition(".")[2], tensor)
    if head_name is None:
        return
    embedding = model.get_input_embeddings().weight
    stored = _stored_head(maker, head_name)
    if stored in source.layers or not is_tied(source.checkpoint.config):
        shape = (head.out_features, head.in_features)
        made: nn.Module = maker.linear(stored, shape, head.bias is not None)
    else:
        source.used.add(f"{stored}.weight")
        made = PlainLinear(embedding, None)
    model.set_submodule(head_name, made)


def _stored_head(maker: LayerMaker, name: str) -> str:
    """The name that the head of Transformers' module has in the file."""
    source = maker.source
    held = (n for n in (name, *_FILE_HEADS) if n in source.layers or source.has(f"{n}.weight"))
    return next(held, name)
