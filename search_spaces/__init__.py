"""Search spaces: operators, the super-kernel, NASBraNet, its decoder and its derived network."""
