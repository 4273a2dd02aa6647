"""The recall experiment of the paper: accuracy against state size, and against the order of addresses."""
