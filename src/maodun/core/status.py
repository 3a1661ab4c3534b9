"""How a search for an adversarial example ended, one value per sample."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Why the search for one sample stopped; `sentence` says it in words."""

    found = 0
    exhausted_steps = 1
    exhausted_budget = 2
    zero_gradient = 3
    non_finite = 4
    skipped_misclassified = 5
    unsupported = 6

    @property
    def sentence(self) -> str:
        """The status as a sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.found: "An input that fools the model was found inside the threat's ball.",
    Status.exhausted_steps: "All steps were taken and the model still answers correctly.",
    Status.exhausted_budget: "The sample's budget of forwards, backwards or queries was spent before success.",
    Status.zero_gradient: "Every gradient the search saw was exactly zero, so it never had a direction.",
    Status.non_finite: "The model returned NaN or infinite values during the search.",
    Status.skipped_misclassified: "The clean input is already misclassified, so there was nothing to attack.",
    Status.unsupported: "This attack cannot be used for this sample, for example for want of classes.",
}
