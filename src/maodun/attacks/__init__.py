"""Spears: every attack, driven by the one engine of `maodun.core`; `registry` finds them by name."""
