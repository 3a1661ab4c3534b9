"""Attacks that are not of the ball: bent images, patches, and one perturbation for all images."""
