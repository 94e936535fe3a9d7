"""What a least-squares map costs at a model's width: processor seconds of its sums, of the map by a
Cholesky factor, of the rank where a factor proves it, and of the map by a general solver with eigenvalues for the rank, as it was first
done. One thread; ratios are to the last of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ppcl_engine.algorithms.least_squares import RIDGE, InputMoments, NormalEquations

from .shared import output

WIDTH, ROWS = 3072, 4096
QUICK_WIDTH, QUICK_ROWS = 96, 128


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def general(equations: NormalEquations) -> torch.Tensor:
    """The same map without a factor, and the eigenvalues that its rank is read from."""
    gram = equations.inputs.xx
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    torch.linalg.eigvalsh(gram)
    return torch.linalg.solve(gram + penalty, equations.xy)


def run(width: int, rows: int, seed: int = 0) -> dict:
    """Seconds by part. A second map of the same inputs shares their factor."""
    generator = torch.Generator().manual_seed(seed)
    x, y, other = (torch.randn(rows, width, generator=generator) for _ in range(3))
    inputs = InputMoments(width)
    first, second = (NormalEquations(width, width, inputs=inputs) for _ in range(2))
    found = {
        "sums_of_inputs": seconds(lambda: inputs.add(x)),
        "sums_of_targets": seconds(lambda: first.add(x, y)),
    }
    second.add(x, other)
    found |= {
        "map": seconds(lambda: first.solve(RIDGE)),
        "rank": seconds(inputs.rank),
        "next_map_of_the_same_inputs": seconds(lambda: second.solve(RIDGE)),
        "general_solver_and_eigenvalues": seconds(lambda: general(first)),
    }
    slowest = found["general_solver_and_eigenvalues"]
    return {
        "width": width,
        "rows": rows,
        "seconds": {name: round(value, 3) for name, value in found.items()},
        "share": {name: round(value / slowest, 3) for name, value in found.items()},
    }


def main(arguments: list[str] | None = None) -> Path:
    chosen = output.parse(output.options("solving", __doc__), arguments)
    torch.set_num_threads(1)
    values = run(QUICK_WIDTH, QUICK_ROWS) if chosen.quick else run(WIDTH, ROWS)
    rows = [[name, values["seconds"][name], values["share"][name]] for name in values["seconds"]]
    output.print_table(f"a map of {values['width']} channels", ["part", "seconds", "share"], rows)
    return output.write("solving", chosen, values)


if __name__ == "__main__":
    main()
