"""What to change where a run does not fit a device: overrides that can be given as they stand."""

from seqlab.plan.topology import GiB
from seqlab.train.config import Config


def advice(config: Config, needed: float, capacity: float, weights: float) -> str:
    """One sentence. needed, capacity, weights (with optimizer and gradients): bytes a device."""
    remedy = " or ".join(_remedies(config, capacity, weights))
    return (
        f"A device needs {needed / GiB:.1f} GiB and has {capacity / GiB:.1f}, of which weights, "
        f"moments and gradients take {weights / GiB:.1f}: try {remedy}."
    )


def _remedies(config: Config, capacity: float, weights: float) -> list[str]:
    c, mesh = config, config.mesh
    found = []
    rows = c.data.batch // c.accumulate
    if weights > 0.7 * capacity:  # too little is left for activations, however few
        if mesh.seq % 2 == 0:
            found.append(f"mesh.seq={mesh.seq // 2} mesh.model={mesh.model * 2}")
            if rows % (2 * mesh.data) == 0:
                found.append(f"mesh.seq={mesh.seq // 2} mesh.data={mesh.data * 2}")
        return found or ["more devices, with a larger mesh.model or mesh.data"]
    if c.model.remat != "all":
        found.append("model.remat=all")
    if rows % (2 * mesh.data) == 0:
        found.append(f"accumulate={2 * c.accumulate}")
        found.append(f"data.batch={c.data.batch // 2}")
    elif mesh.model == 1 and not found:
        found.append(f"data.length={c.data.length // 2}")
    doubled = f"twice the devices with mesh.seq={mesh.seq * 2}"
    return [*found, doubled]
