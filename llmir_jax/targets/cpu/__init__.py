"""The CPU target: a whole step as one native function, generated as LLVM IR and called through XLA's FFI.

plan.py            which values are stored, phases, barriers, memory; the main function
expressions.py     any region of elementwise and layout operations as the body of a loop
loops.py           loops: storing, reductions, norms, pages, rounding of activations
matmul.py          products with packed weights
attention.py       attention to pages in place, token by token
attention_tiles.py the same for prompts, by tiles of queries
tokens.py          which rows are tokens, so that padding is not computed
index.py elementary.py index maps; exp, tanh, sin …
layout.py          how a weight lies in memory; weights.py: where
llvm.py host.py    LLVM IR and its compilation; what the machine has
team.py ffi.py     threads and barriers; how XLA calls the step
native.py          all together: a step's module → a registered native function
"""
