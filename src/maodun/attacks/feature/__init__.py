"""Attacks on what a surrogate computes half-way instead of on what it answers: DR, NRDM, SSP, FIA, ILA, relation."""
