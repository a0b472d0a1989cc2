"""What is unnatural about the text of a source: rendered already, repeated, identifiers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantkit.calibration.chat import Render, TemplateRefusalError
from quantkit.calibration.documents import Document
from quantkit.calibration.identifiers import is_identifiers

MARKERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]")
"""How turns begin in widely used chat templates, whatever the model's own is."""
NOTED = 0.1
"""The share of documents above which a finding is told."""
REPEATED = 0.5
REFUSED = 0.9
"""The share of identifiers above which there is no text: short base64 is not always recognised."""


@dataclass
class Observed:
    """Counts over the documents used of one source. `bos` is the text of the tokenizer's BOS."""

    bos: str | None
    markers: tuple[str, ...]
    documents: int = 0
    identifiers: int = 0
    rendered: int = 0
    begun: int = 0
    texts: Counter[int] = field(default_factory=Counter)

    def add(self, document: Document) -> None:
        """Count one document; a conversation is the text of all its turns."""
        content = document.text
        begun = self.bos is not None and content.startswith(self.bos)
        self.documents += 1
        self.identifiers += is_identifiers(content)
        self.begun += begun
        self.rendered += begun or any(marker in content for marker in self.markers)
        self.texts[hash(content)] += bool(content.strip())

    @property
    def only_identifiers(self) -> bool:
        return self.identifiers > REFUSED * self.documents

    def notes(self, label: str) -> list[str]:
        """Sentences for the user, each with the share of the documents used."""
        found = []
        if self.rendered > NOTED * self.documents:
            kept = f"; {self.begun} begin with {self.bos}, and no second one was added"
            found.append(
                f"{label}: {self._share(self.rendered)} of its documents have been through a chat "
                f"template already{kept if self.begun else ''}. Conversations that are not "
                "rendered get the model's own template."
            )
        most = max(self.texts.values(), default=0)
        if most > 1 and most > REPEATED * self.documents:
            found.append(f"{label}: {self._share(most)} of its documents are one repeated text.")
        if self.identifiers > NOTED * self.documents:
            found.append(
                f"{label}: {self._share(self.identifiers)} of its documents hold identifiers, not "
                "text (UUIDs, hex digests, base64 or numbered names)."
            )
        return found

    def _share(self, count: int) -> str:
        return f"{count / self.documents:.0%} ({count} of {self.documents})"


def turn_marker(render: Render, special_tokens: Mapping[str, str]) -> str | None:
    """The marker with which this template begins a user's turn, `<|turn|>` for example; None
    where words do, or the BOS alone."""
    asked = "What is it?"
    try:
        text = render([{"role": "user", "content": asked}])
    except TemplateRefusalError:
        return None
    found = re.findall(r"<[^<>\s]{1,40}>|\[[A-Z_]+\]", text.partition(asked)[0])
    apart = [marker for marker in found if marker not in special_tokens.values()]
    return apart[-1] if apart else None
