"""`--method auto` resolved into an ordinary recipe file beside the output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.backends.process.job import Reporter
from quantkit.errors import InputError, command
from quantkit.pipeline.publish import check_apart, check_target
from quantkit.validation.reports.write import write_reports
from quantkit.validation.search.auto import SearchRequest, search
from quantkit.validation.search.budget import split_changes
from quantkit.validation.search.recipe import write_recipe


def searched_recipe(
    model: str,
    out: Path,
    changes: Sequence[str],
    ui: Reporter,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """Search, and write OUT.recipe.yaml and what was measured, OUT.search.json; the first's path.
    With `resume` the recipe that is there.

    Raises InputError where one of them, or `out`, exists and is not to be overwritten, and as
    `search` does.
    """
    file, found = (out.with_name(f"{out.name}{end}") for end in (".recipe.yaml", ".search.json"))
    budget, rest = split_changes(changes)
    if resume and file.is_file():
        return file
    check_apart(out, Path(model))
    check_target(out, overwrite=overwrite)
    for path in (file, found):
        if path.exists() and not overwrite:
            raise InputError(
                f"{path} exists.",
                hint=f"{command('quantize', model, '--recipe', file, '--out', out)}, or "
                "--overwrite to search again",
                code="search.exists",
            )
    work = out.with_name(f"{out.name}.search")
    best = search(SearchRequest(model, budget, tuple(rest), work, device, trust_remote_code), ui)
    winner = best.winner
    about = [
        f"Searched by quantkit for {budget.described}: KL {winner.kl:.4g} nats a token,",
        f"{winner.bits_per_weight:.3f} bits a weight. quantkit quantize MODEL --recipe FILE",
    ]
    write_recipe(winner.recipe, file, about)
    write_reports(best.to_json(), [found])
    told = ", ".join(f"{count} × {name}" for name, count in winner.groups.items())
    ui.note(
        f"the recipe is {file}: KL {winner.kl:.4g} nats, {winner.bits_per_weight:.3f} bits a "
        f"weight ({told})"
    )
    return file
