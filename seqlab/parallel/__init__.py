"""Meshes and the transport of states along them; knows nothing of any recurrence."""

from seqlab.parallel.mesh import make_mesh, use_mesh
from seqlab.parallel.sequence import total

__all__ = ["make_mesh", "total", "use_mesh"]
