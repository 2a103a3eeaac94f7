"""Parts of the model that instructions belong to, by the name XLA keeps for each.

Names are the paths of Flax's modules and JAX's transformations, such as
"jit(step)/transpose(jvp(Transformer))/while/body/.../periods/layer_0/moe/shared/dot_general"; a
method of a module is a step of its own ("moe/moe._shared/shared"). A fused kernel has the name of
the last operation in it. What the compiler made itself, such as a reduce-scatter of gradients, has
none: it goes to the part whose result it reads, or else to the one that reads its own.
"""

import re

from planning.hlo import Instruction, Module
from planning.work import Executed

MOST_STEPS, MOST_NEIGHBOURS = 4, 8
"""How far the search for a name goes."""

RULES = (
    (r"/moe/(moe\._\w+/)?shared/", "shared experts"),
    (r"/moe/.*(shard_map|while|convert_element_type|grouped_)", "routed experts"),
    (r"/moe/", "router"),
    (r"/attention/|attention_norm", "attention"),
    (r"/ffn/|ffn_norm", "dense layers"),
    (r"BcD,DV|BcV|BD,DV|unembedding|chunked", "output layer"),
    (r"jvp\(|Transformer", "rest of the model"),
    (r".", "optimiser and metrics"),
)
"""The first pattern that is found decides."""

UNNAMED = "unnamed"


def part_of(executed: Executed) -> str:
    """One of the parts in RULES, or "unnamed" where the compiler kept no name."""
    module, computation = executed.module, executed.computation
    name = _own_name(module, executed.instruction)
    for neighbours in (computation.operands, lambda x: computation.users[x.name]):
        nearest = [executed.instruction]
        for _ in range(MOST_STEPS):
            nearest = [near for x in nearest for near in neighbours(x)][:MOST_NEIGHBOURS]
            named = (_own_name(module, x) for x in nearest if x.opcode != "parameter")
            name = name or next((x for x in named if x), "")
    return next((part for pattern, part in RULES if re.search(pattern, name)), UNNAMED)


def _own_name(module: Module, instruction: Instruction) -> str:
    """Its name, or that of the last instruction of a fusion that has one."""
    callee = instruction.callee("calls")
    if instruction.op_name or callee is None:
        return instruction.op_name
    inner = module.computations[callee].instructions.values()
    return next((x.op_name for x in reversed(list(inner)) if x.op_name), "")
