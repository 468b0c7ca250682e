"""MODEL N_PROMPT N_GENERATE N_THREADS: one measurement of llama.cpp, as a line of JSON.

Run by the interpreter that has one of its packages; nothing of tinychat is imported here.
"""
import ctypes
import json
import random
import resource
import sys
import time

DECODE_PROMPT = 16
N_IDS = 30_000  # ids below this are in every vocabulary of a real model


def ids(n):
    return [random.randrange(N_IDS) for _ in range(n)]


def with_llama_cpp(path, n_prompt, n_generate, n_threads):
    """llama-cpp-python, the C interface below its class."""
    import llama_cpp as llama
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p())
    start = time.perf_counter()
    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(path.encode(), model_params)
    params = llama.llama_context_default_params()
    params.n_ctx = max(n_prompt, DECODE_PROMPT + n_generate) + 8
    params.n_batch = params.n_ubatch = max(512, min(n_prompt, 2048))
    params.n_threads = params.n_threads_batch = n_threads
    context = llama.llama_init_from_model(model, params)
    if not model or not context:
        raise SystemExit(f"llama.cpp does not load {path}")
    load_s = time.perf_counter() - start
    greedy = llama.llama_sampler_init_greedy()

    def step(tokens):
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")
        return llama.llama_sampler_sample(greedy, context, -1)

    def prompt(n):
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        tokens = ids(n)
        start = time.perf_counter()
        for i in range(0, n, params.n_batch):
            token = step(tokens[i:i + params.n_batch])
        return token, time.perf_counter() - start

    prompt(2)
    _, prefill_s = prompt(n_prompt)
    token, _ = prompt(DECODE_PROMPT)
    start = time.perf_counter()
    for _ in range(n_generate):
        token = step([token])
    decode_s = time.perf_counter() - start
    version = f"llama-cpp-python {llama.__version__}"
    return version, load_s, n_prompt / prefill_s, n_generate / decode_s


def with_xllamacpp(path, n_prompt, n_generate, n_threads):
    """xllamacpp, llama.cpp's server without HTTP; the times are the server's own."""
    from importlib.metadata import version

    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_gpu_layers, params.n_parallel = 0, 1
    params.n_ctx = max(n_prompt, DECODE_PROMPT + n_generate) + 8
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    start = time.perf_counter()
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - start

    def timings(n, n_predict):
        answer = server.handle_completions({"prompt": ids(n), "n_predict": n_predict,
                                            "temperature": 0, "ignore_eos": True,
                                            "cache_prompt": False})
        return (json.loads(answer) if isinstance(answer, str) else answer)["timings"]

    prefill = timings(n_prompt, 1)["prompt_per_second"]
    decode = timings(DECODE_PROMPT, n_generate)["predicted_per_second"]
    return f"xllamacpp {version('xllamacpp')}", load_s, prefill, decode


def peak_memory_bytes():
    """Linux hands ru_maxrss on from the process that started this one; VmHWM begins at exec."""
    try:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status
                        if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def main(path, *numbers):
    for measure in (with_llama_cpp, with_xllamacpp):
        try:
            found = measure(path, *map(int, numbers))
            break
        except ImportError:
            continue
    else:
        raise SystemExit(f"{sys.executable} has neither llama_cpp nor xllamacpp")
    version, load_s, prefill, decode = found
    print(json.dumps({"version": version, "load_seconds": load_s,
                      "prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode,
                      "peak_memory_bytes": peak_memory_bytes()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
