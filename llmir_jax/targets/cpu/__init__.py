"""The CPU target: a step as native functions, one if it can be, generated as LLVM IR and called through XLA's FFI.

support.py         which operations have native code; regions.py: what splits a step
plan.py roots.py   which values are stored, what makes them; attached.py: what is done where a product is computed
schedule.py        order, barriers, memory; the main function
expressions.py     any region of elementwise and layout operations as the body of a loop; elementwise.py: instructions
loops.py rows.py   loops: storing, reductions, norms; pages.py activations.py: pages, rounding of activations
matmul.py          products with packed weights
attention.py       attention to pages in place, token by token
attention_tiles.py the same for prompts, by tiles of queries
tokens.py          which rows are tokens, so that padding is not computed
selection.py       the largest elements of a row
index.py elementary.py index maps; exp, tanh, sin …; halves.py: floats of 16 bits
layout.py          how a weight lies in memory; weights.py: where
llvm.py host.py    LLVM IR and its compilation; what the machine has
team.py ffi.py     threads and barriers; how XLA calls the step
native.py          all together: a step's module → a registered native function
"""
