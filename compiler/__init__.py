"""An ahead-of-time model compiler for CPUs: checkpoints in, validated and versioned releases out."""

__version__ = "0.1.0"
