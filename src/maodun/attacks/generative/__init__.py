"""Generative attacks: a network is trained once, then every adversarial image costs one forward of it.

`advgan` and `multi-proxy` perturb an image inside a ball, `gan-sampling` draws whole ones. Networks, loss terms, the
games played over a batch, the training loop and the collapse metrics are modules of their own.
"""
