"""Compiles every kernel for a device that need not be there.

`python -m tests.helpers.ahead_of_time 90 all` prints what became of each, as JSON;
`once` compiles each kernel for the first of its specimens alone. Triton must not
interpret here, so that tests call it in a process of its own.
"""

import inspect
import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_sketch.sketches.multi_tensor.kernels import (
    blocks,
    lifted,
    lifted_long_blocks,
    long_blocks,
    matrices,
    rows,
)
from hf_sketch.sketches.transforms import hadamard_kernels
from hf_sketch.sketches.transforms.signs import RUN
from hf_sketch.sketches.two_sided import turn_kernels

# What GPT-2-small's matrices have with 4096 numbers, and two shapes of small ones.
SHAPES = (
    (64, 8, 8, 8, 8, 1, 64, 64, 64**-0.5),
    (8, 16, 64, 1, 64, 1, 8, 16, 8**-0.5),
    (64, 2, 2, 2, 2, 16, 60, 64, 60**-0.5),
)
BLOCKS = {"LEADING": 1, "FOLDS": 1, "RUN": RUN}
MATRICES = {"SHAPES": SHAPES[:1], "COUNT": 1}
TENSORS = {"KIND": 0, "ALIGNED": True}
READ = TENSORS | {"SCALED": False}
LIFTED = TENSORS | {"LEADING": 1, "BLOCK": 1024, "RUN": RUN}
LONG = {"RUN": RUN}
WHOLE = " % 16"  # of a number that is a multiple of 16
ONE_SIDE = {"COUNT": 1, "SIDES": 1, "GROUPS": 64, "PADDED": 64, "SIZE": 8}
ONE_SIDE |= {"SCALED": False, "AT_ONCE": 16, "stride": "i32 % 16", "length": "i32 % 16"}
TURNED = ("COUNT", "SIDES", "SCALED")  # not arguments of `turn_softmax`
SOFTMAX = {name: x for name, x in ONE_SIDE.items() if name not in TURNED}
LEADING = {"LEADING": 2}
# Of each kernel: arguments that it is compiled for, types of pointers, and warps.
SPECIMENS = [
    (rows.gather, {"KIND": 3}, 4),
    (rows.add_rows, {}, 4),
    *(
        (rows.finish_row, {"ROUNDING": 1e-6, "ROTATES": rotates}, 4)
        for rotates in (True, False)
    ),
    *((blocks.sum_blocks, BLOCKS | READ | {"KIND": k}, 1) for k in range(4)),
    (blocks.sum_blocks, BLOCKS | READ | {"LEADING": 4}, 4),
    (blocks.sum_blocks, BLOCKS | READ | {"FOLDS": 16, "ALIGNED": False}, 1),
    (blocks.sum_blocks, BLOCKS | READ | {"SCALED": True}, 1),
    *(
        (long_blocks.sum_long_blocks, LONG | READ | {"LEADING": 2**k}, 8)
        for k in range(4)
    ),
    (long_blocks.sum_long_blocks, LONG | READ | LEADING | {"KIND": 3}, 8),
    (long_blocks.sum_long_blocks, LONG | READ | LEADING | {"SCALED": True}, 8),
    *((matrices.sum_matrices, MATRICES | READ | {"KIND": k}, 4) for k in range(4)),
    (matrices.sum_matrices, MATRICES | READ | {"SCALED": True}, 4),
    (
        matrices.sum_matrices,
        READ | {"SHAPES": SHAPES, "COUNT": 3, "ALIGNED": False},
        4,
    ),
    (lifted.spread, {"KIND": 1, "BASE": 1}, 4),
    *((lifted.lift_blocks, LIFTED | {"KIND": k, "BASE": k}, 1) for k in range(4)),
    (lifted.lift_blocks, LIFTED | {"LEADING": 4, "BASE": 4}, 4),
    *(
        (
            lifted_long_blocks.lift_long_blocks,
            LONG | TENSORS | {"LEADING": 2**k, "KIND": k, "BASE": k},
            8,
        )
        for k in range(4)
    ),
    (
        lifted_long_blocks.lift_long_blocks,
        LONG | TENSORS | LEADING | {"BASE": 4, "ALIGNED": False},
        8,
    ),
    *(
        (lifted.lift_matrices, MATRICES | TENSORS | {"KIND": k, "BASE": k}, 4)
        for k in range(4)
    ),
    (
        lifted.lift_matrices,
        TENSORS | {"SHAPES": SHAPES, "COUNT": 3, "ALIGNED": False, "BASE": 4},
        4,
    ),
    (hadamard_kernels.sum_whole, LONG | {"LEADING": 1, "ORDERED": True}, 1),
    (hadamard_kernels.rotate_tiles, LONG | {"TILES": 4}, 4),
    (hadamard_kernels.sum_strips, LONG | {"LEADING": 8}, 8),
    (turn_kernels.turn_sides, ONE_SIDE | {"x_ptr": "*bf16"}, 4),
    (turn_kernels.turn_sides, ONE_SIDE | {"x_ptr": "*fp16"}, 4),
    (turn_kernels.turn_sides, ONE_SIDE, 4),
    (turn_kernels.turn_sides, ONE_SIDE | {"COUNT": 3, "SIDES": 4, "AT_ONCE": 4}, 4),
    (turn_kernels.turn_sides, ONE_SIDE | {"SIZE": 64, "AT_ONCE": 2}, 4),
    (turn_kernels.turn_sides, ONE_SIDE | {"x_ptr": "*bf16", "SCALED": True}, 4),
    (turn_kernels.turn_sides, ONE_SIDE | {"GROUPS": 4, "PADDED": 16}, 4),
    (turn_kernels.turn_sides, ONE_SIDE | {"stride": "i32", "length": "i32"}, 4),
    (turn_kernels.turn_softmax, SOFTMAX | {"x_ptr": "*bf16"}, 4),
    (turn_kernels.turn_softmax, SOFTMAX, 4),
    (turn_kernels.turn_softmax, SOFTMAX | {"SIZE": 64, "AT_ONCE": 2}, 4),
    (turn_kernels.turn_softmax, SOFTMAX | {"stride": "i32", "length": "i32"}, 4),
]
TABLES = ("given_ptr", "streams_ptr", "matrices_ptr", "chunks_ptr")
TABLES += (
    "chosen_ptr",
    "sums_ptr",
    "terms_ptr",
    "places_ptr",
    "base_ptr",
    "scales_ptr",
)
WORDS = ("units_ptr", "runs_ptr", "items_ptr", "orders_ptr", "order_ptr", "bounds_ptr")
WORDS += ("ranges_ptr", "signs_ptr", "parts_ptr")
TYPES = {
    **dict.fromkeys(TABLES, "*i64"),
    **dict.fromkeys(WORDS, "*i32"),
    "finite_ptr": "*u8",
    "scale": "fp32",
    "loss_scale": "fp32",
    "start": "i64",
    "origin": "i64",
}


def type_of(name):
    default = "*fp32" if name.endswith("_ptr") else "i32"
    return TYPES.get(name, default)


def compiled(kernel, constants, warps, capability):
    """What a kernel becomes on a device of this capability."""
    names = kernel.arg_names
    types = {n: x for n, x in constants.items() if isinstance(x, str)}
    constants = {n: x for n, x in constants.items() if n not in types}
    if "BFLOAT16" in names:
        constants = constants | {"BFLOAT16": True}
    signature = {n: "constexpr" if n in constants else type_of(n) for n in names}
    signature |= {name: kind.removesuffix(WHOLE) for name, kind in types.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or types.get(name, "").endswith(WHOLE)
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    target = GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target, options=options)
    code = found.asm["ptx"]
    wide = r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global"
    return {
        "kernel": inspect.unwrap(kernel.fn).__name__,
        "kind": constants.get("KIND"),
        "aligned": constants.get("ALIGNED"),
        "target": re.search(r"\.target (sm_\d+)", code)[1],
        "bytes": len(found.asm["cubin"]),
        "vector_reads": len(re.findall(wide, code)),
        "vector_writes": len(re.findall(r"st\.global\S*\.v4\.b32", code)),
        "products": len(re.findall(r"mma\.sync|wgmma\.mma|tcgen05\.mma", code)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.global", code)),
    }


if __name__ == "__main__":
    chosen = SPECIMENS
    if sys.argv[2] == "once":
        chosen = {kernel: rest for kernel, *rest in reversed(SPECIMENS)}
        chosen = [(kernel, *rest) for kernel, rest in chosen.items()]
    found = [compiled(*specimen, int(sys.argv[1])) for specimen in chosen]
    sys.stdout.write(json.dumps(found))
