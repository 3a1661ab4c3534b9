"""Adapters that give every peer library the same face: `(job) -> zero-argument callable -> adversarial batch`."""
