"""Attacks whose inputs are meant for another model than the one they are searched on.

loop: the iterative attack and its hooks by name · inputs: random changes of the input before the gradient is taken
(DI, SI, SSM) · smoothing: the gradient's convolution (TI) · rules: what the members of an ensemble add up to (SVRE,
AdaEA, CWA). Momentum (MI) and look-ahead (NI) are those of attacks.gradient.pgd.
"""
