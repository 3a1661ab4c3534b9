"""The shield: what is done in training, before the model, or instead of it, to withstand an attack."""
