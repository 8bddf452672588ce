"""Cycles of the TPU kernels by the compiler's own schedule: `python benchmarks/tpu_schedule.py`, on any CPU.

Needs `pip install '.[aot]'`, whose libtpu compiles for chips that are not there. Each kernel's cycles are its final
bundles times the trips of its loops, with every load from memory taken to be in time; beside them are the cycles in
which the matrix's bytes come from memory, and those in which the matrix units could multiply, both at the chip's
published figures. Nothing is run: this is a schedule, not a measurement.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tpu_bundles
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from twla_jax.bench import shapes
from twla_jax.models.config import DecoderConfig
from twla_jax.ops.expert_matmul import block_size
from twla_jax.ops.expert_matmul import tpu as expert_tpu
from twla_jax.ops.rotate_quantize import tpu as rotate_tpu
from twla_jax.ops.ternary_matmul import tpu as ternary_tpu
from twla_jax.ops.tokens import quantizer_settings

EXPERTS = (128, 2048, 768)  # Qwen3-30B-A3B: experts, and the rows and columns of their last matrix
CHOICES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Describes one core of a chip: what `jax.jit` calls a device."""

    topology: str
    version: pltpu.ChipVersion
    clock: float  # GHz: the published peak over what the compiler has the matrix units do in a cycle

    @property
    def info(self) -> pltpu.TpuInfo:
        """Return JAX's table of the chip, of one core."""
        return pltpu.get_tpu_info_for_chip(self.version, 1)

    def peak(self, *, integers: bool) -> float:
        """Return the operations in a cycle: of int8 if asked for, where the chip has it, else of bf16."""
        int8 = self.info.int8_ops_per_second if integers else 0
        return (int8 or self.info.bf16_ops_per_second) / (self.clock * 1e9)

    @property
    def bandwidth(self) -> float:
        """Return the bytes from memory in a cycle."""
        return self.info.mem_bw_bytes_per_second / (self.clock * 1e9)


CHIPS = {
    "v5e": Chip(topology="v5e:2x2", version=pltpu.ChipVersion.TPU_V5E, clock=1.5),
    "v6e": Chip(topology="v6e:2x2", version=pltpu.ChipVersion.TPU_V6E, clock=1.75),
    "v7x": Chip(topology="tpu7x:2x2x1", version=pltpu.ChipVersion.TPU_7X, clock=1.1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Describes a call of a kernel: its bytes from memory, and its operations."""

    name: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    size: float
    work: float
    integers: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Holds a call's cycles, and what bounds it."""

    chip: str
    op: str
    tokens: int
    kernel: int
    around: int
    memory: float
    multiply: float

    @property
    def of_bound(self) -> float:
        """Return the kernel's cycles over those of what bounds it."""
        return self.kernel / max(self.memory, self.multiply)

    def line(self) -> str:
        """Return the row of a Markdown table."""
        numbers = (self.kernel, self.around, round(self.memory), round(self.multiply))
        cells = (self.chip, self.op, str(self.tokens), *(f"{n:,}" for n in numbers))
        return f"| {' | '.join(cells)} | {self.of_bound:.2f} |"


HEADER = (
    "| chip | matrix | tokens | kernel's cycles | XLA's around it | bytes from memory | multiplying | × bound |\n"
    "|---|---|---|---|---|---|---|---|"
)


class Compiler:
    """Compiles for chips that are not there, and reads the final bundles."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.by_name: dict[str, int] = {}
        # Read when libtpu is loaded, with the first topology.
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        self._topology = functools.cache(
            lambda chip: topologies.get_topology_desc(CHIPS[chip].topology, platform="tpu")
        )

    def compile(
        self, chip: str, function: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()
    ) -> Any:
        """Return the compiled program of a function of these shapes; some may be written in place."""
        topology = self._topology(chip)
        sharding = SingleDeviceSharding(topology.devices[0])
        shaped = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
        )
        mesh = topologies.make_mesh(topology, (len(topology.devices),), ("x",))
        for file in self.folder.iterdir():
            file.unlink()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.jit(function, donate_argnums=donated).lower(*shaped).compile()

    def cycles(
        self, chip: str, function: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()
    ) -> tuple[int, int]:
        """Return the cycles of a program's Pallas kernels, and of XLA's own ops around them.

        Kernels of one body are compiled once, and counted as often as they are called. `by_name` then has the cycles by
        the names of the program.
        """
        program = self.compile(chip, function, *arguments, donated=donated).as_text()
        bodies = dict(re.findall(r"%(\S+) = .* custom-call\(.*tpu_custom_call.*(backend_config=.*)", program))
        often = Counter(bodies.values())
        calls = {name: often[body] for name, body in bodies.items()}
        read = set()
        found = {True: 0, False: 0}
        self.by_name.clear()
        for file in self.folder.glob("*-final_bundles.txt"):
            match = re.match(r"\d+-(.*)-\d+-final_bundles", file.name)
            if match and not re.fullmatch(r"TLP|<.*>", match[1]):
                own = match[1] in calls
                if own and bodies[match[1]] in read:
                    continue  # one that was compiled for every call
                read |= {bodies[match[1]]} if own else set()
                cycles = calls.get(match[1], 1) * tpu_bundles.cycles(file.read_text(), lenient=not own)
                found[own] += cycles
                self.by_name[match[1]] = self.by_name.get(match[1], 0) + cycles
        return found[True], found[False]


def products(config: DecoderConfig, tokens: int) -> Iterator[Call]:
    """Yield the products with a block's matrices."""
    for name, (n, m) in shapes.matrices(config).items():
        weight = jax.eval_shape(lambda n=n, m=m: shapes.weight(jax.random.key(0), n, m))
        x = jax.eval_shape(lambda m=m: shapes.tokens(jax.random.key(0), tokens, m))
        yield Call(
            name=f"{name} {n}×{m}",
            function=functools.partial(ternary_tpu.matmul, out_dtype=jnp.bfloat16),
            operands=(x.codes, x.sums, x.scale, x.zero_point, weight),
            size=_bytes(weight),
            work=2 * tokens * n * m,
        )


def rotations(config: DecoderConfig, tokens: int) -> Iterator[Call]:
    """Yield norm, rotation and codes of inputs of each width."""
    for m in sorted({m for _, m in shapes.matrices(config).values()}):
        rotation = jax.eval_shape(lambda m=m: shapes.rotation_for_kernels(jax.random.key(0), m, m))
        x, norm = jax.ShapeDtypeStruct((tokens, m), jnp.bfloat16), jax.ShapeDtypeStruct((m,), jnp.bfloat16)
        settings = jax.eval_shape(lambda: quantizer_settings(8, 1.0))
        yield Call(
            name=f"norm, rotation, codes {m}",
            function=functools.partial(rotate_tpu.rotate_quantize, epsilon=1e-6),
            operands=(x, rotation, settings, norm),
            size=3 * tokens * m + _bytes(rotation),
            work=2 * tokens * m * (rotation.size + rotation.right_transposed.shape[0]),
            integers=False,
        )


def experts(tokens: int) -> Iterator[Call]:
    """Yield the product with the experts of a mixture: a block for each choice of few tokens, else of up to 64 rows."""
    count, n, m = EXPERTS
    one = jax.eval_shape(lambda: shapes.weight(jax.random.key(0), n, m))
    weight = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), one)
    size = block_size(tokens * CHOICES, count, expert_tpu.LEAST_ROWS, expert_tpu.MOST_ROWS)
    blocks = tokens * CHOICES if size == expert_tpu.LEAST_ROWS else tokens * CHOICES // size + count
    yield Call(
        name=f"experts {n}×{m}, {CHOICES} of {count}",
        function=expert_tpu.products,
        operands=(
            jax.ShapeDtypeStruct((blocks, size, m), jnp.int8),
            weight,
            jax.ShapeDtypeStruct((blocks,), jnp.int32),
        ),
        size=min(blocks, count) * _bytes(one),
        work=2 * tokens * CHOICES * n * m,
    )


def _bytes(weight: Any) -> float:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default="llama-2-7b,qwen3-8b", help="of `twla bench --shape`")
    parser.add_argument("--chips", default=",".join(CHIPS), help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--tokens", default="1,8,32,2048")
    parser.add_argument("--only", default="", help="part of the names of rows")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder))
        print(HEADER)
        for chip in options.chips.split(","):
            seen = set()
            for tokens in map(int, options.tokens.split(",")):
                configs = [shapes.SHAPES[name] for name in options.shapes.split(",")]
                calls = [
                    call
                    for config in configs
                    for make in (products, rotations)
                    for call in make(config, tokens)
                ]
                for call in [*calls, *experts(tokens)]:
                    if options.only not in call.name or (call.name, tokens) in seen:
                        continue
                    seen.add((call.name, tokens))
                    kernel, around = compiler.cycles(chip, call.function, *call.operands)
                    rows.append(
                        Row(
                            chip=chip,
                            op=call.name,
                            tokens=tokens,
                            kernel=kernel,
                            around=around,
                            memory=call.size / CHIPS[chip].bandwidth,
                            multiply=call.work / CHIPS[chip].peak(integers=call.integers),
                        )
                    )
                    print(rows[-1].line(), flush=True)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
