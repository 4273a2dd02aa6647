"""What ``lowering.compile`` runs instead of a model's blocks and head."""
