"""The contract, as a suite that any mixer can be held to."""

from seqlab.conformance.report import Report, Row
from seqlab.conformance.suite import check, load_mixer

__all__ = ["Report", "Row", "check", "load_mixer"]
