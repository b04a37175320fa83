"""GFLOP/s of numpy's F32 matrix product at n = 4096: what cargo bench --bench feedback is compared with.

python3 tests/bench/sgemm.py
"""
import statistics
import time

import numpy

N = 4096
a = numpy.random.default_rng(1).random((N, N), dtype=numpy.float32)
b = a.T.copy()
times = []
for _ in range(6):
    begun = time.perf_counter()
    a @ b
    times.append(time.perf_counter() - begun)
print(f"sgemm {N}: {2 * N**3 / statistics.median(times[1:]) / 1e9:.0f} GFLOP/s")
