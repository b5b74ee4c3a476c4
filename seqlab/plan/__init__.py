"""What a run needs and how fast it would be on machines that one does not have."""

from seqlab.plan.command import plan

__all__ = ["plan"]
