"""The multi-task attack (a reconstruction): relations kept in a latent space without labels, and broken there.

`relations` the terms, `module` the relation-preservation module and its controls, `fit` its training and quality gates,
`attack` the search per image, `generator` the same objective (and a rival's) as a trained generator.
"""
