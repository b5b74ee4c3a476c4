"""What GPU kernels of several families share: `trust` decides whether one is used, `blocks` how
large its pieces are."""
