"""The language-modelling experiment: bits per byte of RAM-Net and of other mixers, trained alike on the same text."""
