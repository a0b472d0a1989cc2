"""Which tokens each expert of a mixture really sees while a library calibrates.

How many it must see, and what becomes of one that saw fewer, is said by the recipe:
`expert_floor` and `on_unseen` (`recipe/model.py`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from quantkit.backends.adapters.seen_tokens import Tokens
from quantkit.backends.process.job import Job, JobInputError

_ROUTED = ("top_k_index", "router_indices")
"""What Transformers' expert modules call the experts of each token, [tokens, top k]."""


class ExpertsSeen:
    """Counts, at the modules that hold the experts, the tokens that come to each of them.

    blocks: module of the model → its name in the checkpoint. `routed` are the tokens that the
    router sent, `seen` those that the expert was computed for (more, where a library or `feed`
    brings every token to every expert); padding is left out, and of several passes the largest
    counts, or the first (`once`) of a library that later draws samples at random.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Mapping[str, str],
        tokens: Tokens | None,
        batch_size: int,
        *,
        once: bool = False,
    ) -> None:
        self.modules: dict[str, _Watched] = {}
        if tokens is not None:
            self.modules = {
                block: _Watched(model, name, tokens, batch_size, once=once)
                for name, block in blocks.items()
            }

    @contextmanager
    def watch(self, *, feed: bool) -> Iterator[None]:
        """Count while the body runs; `feed` also gives every token to every expert."""
        hooks = [hook for watched in self.modules.values() for hook in watched.hooks(feed=feed)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for watched in self.modules.values():
                watched.end()

    def summary(self) -> dict[str, Any]:
        """`Result.experts` without what was decided: `routed` and `seen`, block → tokens each.

        A block whose router never ran is not in `routed`.
        """
        return {
            "routed": {n: w.routed for n, w in self.modules.items() if any(w.routed)},
            "seen": {name: watched.seen for name, watched in self.modules.items()},
        }

    def go_on(self, counted: Mapping[str, Any]) -> None:
        """Take over the `summary` of a run that was stopped; its blocks are not counted again."""
        for name, watched in self.modules.items():
            if any(counted["seen"][name]):
                watched.seen = list(counted["seen"][name])
                watched.routed = list(counted["routed"][name])
                watched.passes = 1


class _Watched:
    """One module with experts."""

    def __init__(
        self, model: torch.nn.Module, name: str, tokens: Tokens, batch_size: int, *, once: bool
    ) -> None:
        self.module = model.get_submodule(name)
        self.parent = model.get_submodule(name.rpartition(".")[0])
        self.once = once
        self.passes = 0
        self.parameters = list(inspect.signature(self.module.forward).parameters)
        self.masks = [batch["attention_mask"].bool() for batch in tokens.batches(batch_size)]
        self.count = expert_number(self.module)
        self.routed = [0] * self.count
        self.seen = [0] * self.count
        self.feeding = self.counting = False
        self.calls = self.rows = self.real_rows = 0
        self.scaled: torch.Tensor | None = None
        """Of tokens that are scaled by the router before the experts: which are no padding."""
        self.now: dict[str, Counter[int]] = {"routed": Counter(), "seen": Counter()}

    def end(self) -> None:
        """A pass over the samples is over: keep its counts where they are the largest."""
        for kind, kept in (("routed", self.routed), ("seen", self.seen)):
            kept[:] = [max(kept[i], self.now[kind][i]) for i in range(self.count)]
            self.now[kind].clear()
        self.passes += self.calls > 0
        self.calls = 0

    def hooks(self, *, feed: bool) -> list[Any]:
        """What counts, and what feeds, while the module runs."""
        if type(self.module).forward is torch.nn.Module.forward:
            return self._apart()
        inside = [getattr(expert, "up_proj", None) for expert in _own_modules(self.module)]
        watchers = [
            linear.register_forward_pre_hook(self._computed(index))
            for index, linear in enumerate(inside)
            if linear is not None
        ]
        before = self._before(feed=feed, separate=bool(watchers))
        return [*watchers, self.module.register_forward_pre_hook(before, with_kwargs=True)]

    def _apart(self) -> list[Any]:
        """Experts that their parent calls one by one: where its router says which, that counts;
        elsewhere the rows that come to each."""
        real: list[torch.Tensor] = []
        told: list[bool] = []

        def called(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.counting = not (self.once and self._counted())
            if self.counting:
                hidden = args[0] if args else kwargs["hidden_states"]
                real[:] = [self._real(hidden.numel() // hidden.shape[-1])]

        def chosen(_: torch.nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else ()
            routes = next((t for t in tensors if t.dtype == torch.int64 and t.ndim == 2), None)
            if self.counting and routes is not None and len(routes) == len(real[0]):
                told[:] = [True]
                for kind in ("routed", "seen"):
                    self._add(kind, routes, real[0])

        def computed(index: int) -> Any:
            def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if self.counting and not told:
                    for kind in ("routed", "seen"):
                        self.now[kind][index] += args[0].numel() // args[0].shape[-1]

            return hook

        routers = (getattr(self.parent, name, None) for name in ("gate", "router"))
        experts = enumerate(_own_modules(self.module))
        return [
            self.parent.register_forward_pre_hook(called, with_kwargs=True),
            *(r.register_forward_hook(chosen) for r in routers if isinstance(r, torch.nn.Module)),
            *(expert.register_forward_pre_hook(computed(index)) for index, expert in experts),
        ]

    def _before(self, *, feed: bool, separate: bool) -> Any:
        def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self.feeding or (self.once and self._counted()):
                return
            given = dict(zip(self.parameters, args, strict=False)) | kwargs
            hidden = given["hidden_states"].reshape(-1, given["hidden_states"].shape[-1])
            routes = next((given[name] for name in _ROUTED if name in given), None)
            if routes is None:
                self._add_scaled(hidden, ("routed",) if separate else ("routed", "seen"))
                return
            real = self._real(len(hidden))
            self._add("routed", routes.reshape(len(hidden), -1), real)
            if feed:
                everyone = torch.arange(self.count, device=hidden.device)
                everyone = everyone.expand(len(hidden), -1)
                weights = torch.full_like(everyone, 1 / self.count, dtype=hidden.dtype)
                self.feeding = True
                try:
                    module(hidden, everyone, weights)
                finally:
                    self.feeding = False
                routes = everyone
            if not separate:
                self._add("seen", routes.reshape(len(hidden), -1), real)

        return before

    def _counted(self) -> bool:
        """Whether one pass is over."""
        if self.calls == len(self.masks):
            self.end()
        return self.passes > 0

    def _computed(self, index: int) -> Any:
        """An expert that is a module of its own: the rows that come to it."""

        def computed(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if self.scaled is not None:
                self.now["seen"][index] += int(self._not_zero(args[0]).sum())
                return
            rows = args[0].numel() // args[0].shape[-1]
            self.now["seen"][index] += self.without_padding(rows)

        return computed

    def without_padding(self, rows: int) -> int:
        """The tokens among so many rows of an expert: known where these are all of a batch."""
        return self.real_rows if rows == self.rows else rows

    def _real(self, rows: int) -> torch.Tensor:
        """Which of this call's rows are tokens of the samples and no padding, [rows]."""
        if self.calls == len(self.masks):
            self.end()
        mask = self.masks[self.calls].reshape(-1)
        self.calls += 1
        real = mask if len(mask) == rows else torch.ones(rows, dtype=torch.bool)
        self.rows, self.real_rows = rows, int(real.sum())
        return real

    def _add_scaled(self, hidden: torch.Tensor, kinds: tuple[str, ...]) -> None:
        """Llama 4 gives each expert every token times its score, [experts × tokens, hidden]: a
        token that is not routed to it is zeros."""
        self.scaled = self._real(len(hidden) // self.count).to(hidden.device)
        counts = self._not_zero(hidden).sum(1).tolist()
        for kind in kinds:
            self.now[kind].update(dict(enumerate(counts)))

    def _not_zero(self, hidden: torch.Tensor) -> torch.Tensor:
        """Which rows of scaled tokens are tokens of the samples and not zeros, [experts, tokens]
        without padding."""
        assert self.scaled is not None
        each = hidden.reshape(-1, len(self.scaled), hidden.shape[-1])
        return (each != 0).any(-1)[:, self.scaled]

    def _add(self, kind: str, routes: torch.Tensor, real: torch.Tensor) -> None:
        chosen = routes[real.to(routes.device)].reshape(-1)
        counts = torch.bincount(chosen[chosen < self.count].cpu(), minlength=self.count)
        self.now[kind].update(dict(enumerate(counts.tolist())))


def settled(job: Job, seen: dict[str, Any]) -> dict[str, Any]:
    """`Result.experts`: the counts and, of experts with fewer tokens than the floor, what becomes.

    Raises JobInputError for such experts unless the recipe decides otherwise (`on_unseen`).
    """
    counts = [count for block in seen["seen"].values() for count in block]
    if not counts:
        return {}
    under = {
        f"{block}.{index}": count
        for block, each in seen["seen"].items()
        for index, count in enumerate(each)
        if count < job.expert_floor
    }
    if under and job.on_unseen == "error":
        shown = ", ".join(f"{name} ({count})" for name, count in list(under.items())[:3])
        more = f" and {len(under) - 3} more" if len(under) > 3 else ""
        raise JobInputError(
            f"{len(under)} of {len(counts)} experts saw fewer than {job.expert_floor} calibration "
            f"tokens: {shown}{more}.",
            hint="--set experts=all, or more text: --set calibration.samples=1024; "
            "--set on_unseen=rtn (or keep16) accepts it",
            code="calibration.experts_unseen",
        )
    return {
        "calibrated": job.experts,
        "floor": job.expert_floor,
        "min": min(counts),
        "median": median(counts),
        "under_floor": under,
        "decided": job.on_unseen if under else None,
        **seen,
    }


def expert_number(module: Any) -> int:
    """How many experts with weights the module holds."""
    fused = getattr(module, "down_proj", None)
    if isinstance(fused, torch.Tensor):
        return int(fused.shape[0])
    stated = getattr(module, "num_experts", None)  # LLM Compressor's list has the activation too
    return len(module) if stated is None else int(stated)


def _own_modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    return list(module) if isinstance(module, torch.nn.ModuleList) else []
