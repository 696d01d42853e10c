"""What is left after a power cut, on a full disk, and without a stream."""
