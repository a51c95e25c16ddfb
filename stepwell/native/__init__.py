"""From a program to machine code and the memory it works on.

For every machine: `rewrite` puts a program into a machine's operations, `schedule` says what each
sweep over the elements needs, `tensors` and `reading` find out where the tensors are, `overlap`
which of them share memory, `identity` whether they still are the same ones.
For processors: `assembly` and `lowering` write LLVM IR, `llvm` compiles it, `openmp` has threads.
For GPUs: `triton_source` writes Triton, `triton_jit` compiles it, `uploads` brings tables there.
"""
