"""Machine code in memory: compiling LLVM IR, torch's OpenMP threads, reading many tensors."""
