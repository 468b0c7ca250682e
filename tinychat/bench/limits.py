"""What the machine allows: bytes read from memory, multiply-adds in registers, each second."""
import threading
import time

import numpy as np

BANDWIDTH_BYTES = 512 << 20  # much more than any cache
RUNS = 5
PEAK_ROUNDS = 1 << 20        # some milliseconds each


def measure_limits(isa: str | None, n_threads: int) -> dict:
    """Bytes and operations per second of `n_threads` together; a product and its sum are two
    operations. isa: of the native executor; without it there are no peaks."""
    found = {"read_bandwidth_bytes_per_second": read_bandwidth(n_threads, BANDWIDTH_BYTES)}
    if isa:
        found["int8_peak_per_second"] = peak(isa, True, n_threads)
        found["float32_peak_per_second"] = peak(isa, False, n_threads)
    if isa == "amx_int8":  # which leaves single tokens to AVX-512
        found["int8_vector_peak_per_second"] = peak("avx512_vnni", True, n_threads)
    return {key: value for key, value in found.items() if value}


def peak(isa: str, is_int8: bool, n_threads: int) -> float:
    """Operations per second; 0 where the instruction set has no such measure."""
    from tinychat._kernels import multiply_adds

    n_done = multiply_adds(isa, is_int8, PEAK_ROUNDS) * n_threads
    return n_done / min(_together(lambda rounds: multiply_adds(isa, is_int8, rounds),
                                  [PEAK_ROUNDS] * n_threads) for _ in range(RUNS))


def read_bandwidth(n_threads: int, n_bytes: int) -> float:
    """Bytes per second that `n_threads` read together from `n_bytes`: the best of a few passes.

    max() of float32 has the least arithmetic to a byte among NumPy's reductions (38 GB/s on a
    machine where sum() saw 29).
    """
    parts = np.array_split(np.ones(n_bytes // 4, np.float32), n_threads)
    return n_bytes / min(_together(np.max, parts) for _ in range(RUNS))


def _together(work, parts: list) -> float:
    """Seconds until `work` is done on every part, each on its own thread."""
    gate = threading.Barrier(len(parts) + 1)

    def one(part):
        gate.wait()
        work(part)

    threads = [threading.Thread(target=one, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start
