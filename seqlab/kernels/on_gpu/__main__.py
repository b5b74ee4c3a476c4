"""python -m seqlab.kernels.on_gpu [KERNEL ...]: measures block sizes on the GPU here, and prints
`blocks.json` as it is with them."""

import json
import sys

from seqlab.errors import SeqlabError
from seqlab.kernels import families
from seqlab.kernels.on_gpu.blocks import table
from seqlab.kernels.on_gpu.tuning import CONTESTS, tune


def main(names: list[str]) -> None:
    families.enter_all()
    new = [row for kernel in names or sorted(CONTESTS) for row in tune(kernel)]
    rows = {**table(), **{row[:3]: row for row in new}}
    lines = ",\n".join(f"  {json.dumps(row._asdict())}" for row in rows.values())
    print(f"[\n{lines}\n]")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SeqlabError as error:
        sys.exit(str(error))
