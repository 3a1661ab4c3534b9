"""The arena: where spears meet shields, and what is measured, stored and doubted about it."""
