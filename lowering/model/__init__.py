"""What ``lowering.compile`` puts in the place of a call of a model's parts."""
