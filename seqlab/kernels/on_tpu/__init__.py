"""What TPU kernels of several families share: see `chunk_scan` for the scan itself."""
