"""MODEL PLAN: one measurement of llama.cpp, as a line of JSON.

PLAN: the fields of bench.Plan, and n_threads, in JSON.

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


class LlamaCpp:
    """llama-cpp-python, the C interface below its class: a model, and one context at a time."""

    def __init__(self, path, n_threads):
        import llama_cpp
        self.llama, self.n_threads = llama_cpp, n_threads
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        self.greedy = llama_cpp.llama_sampler_init_greedy()
        self.context = None

    def open(self, n_ctx, n_streams=1):
        """A context of so many tokens for each stream."""
        llama = self.llama
        if self.context:
            llama.llama_free(self.context)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx * n_streams, n_streams
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = self.n_threads
        self.context = llama.llama_init_from_model(self.model, params) if self.model else None
        if not self.context:
            raise SystemExit("llama.cpp does not load the model")

    def step(self, tokens, streams, positions):
        """Tokens of these streams; the next of each stream's last."""
        llama = self.llama
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        wanted = {stream: i for i, stream in enumerate(streams)}
        for i, (token, stream, position) in enumerate(zip(tokens, streams, positions)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = stream, wanted[stream] == i
        failed = llama.llama_decode(self.context, batch)
        llama.llama_batch_free(batch)
        if failed:
            raise SystemExit("llama_decode failed")
        return [llama.llama_sampler_sample(self.greedy, self.context, i) for i in wanted.values()]

    def prompt(self, n, stream=0):
        tokens = ids(n)
        for at in range(0, n, 512):
            part = tokens[at:at + 512]
            [token] = self.step(part, [stream] * len(part), range(at, at + len(part)))
        return token

    def prefill(self, n):
        self.open(n + 8)
        self.prompt(2)
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self.prompt(n)
        return n / (time.perf_counter() - start)

    def decode(self, n_past, n_generate, n_streams=1):
        """Tokens per second of all streams."""
        self.open(n_past + n_generate + 8, n_streams)
        streams = list(range(n_streams))
        tokens = [self.prompt(n_past, stream) for stream in streams]
        start = time.perf_counter()
        for i in range(n_generate):
            tokens = self.step(tokens, streams, [n_past + i] * n_streams)
        return n_streams * n_generate / (time.perf_counter() - start)


def with_llama_cpp(path, plan):
    start = time.perf_counter()
    engine = LlamaCpp(path, plan["n_threads"])
    n_generate = plan["n_generate"]
    engine.open(plan["n_prompt"] + n_generate)
    found = {"load_seconds": time.perf_counter() - start, "version": engine.version,
             "prefill_tokens_per_second": engine.prefill(plan["n_prompt"]),
             "decode_tokens_per_second": engine.decode(DECODE_PROMPT, n_generate)}
    for n in plan["streams"]:
        found[f"decode_tokens_per_second_of_{n}_streams"] = engine.decode(
            DECODE_PROMPT, n_generate, n)
    for n in plan["depths"]:
        found[f"decode_tokens_per_second_after_{n}"] = engine.decode(n, n_generate)
    return found


def with_xllamacpp(path, plan):
    """xllamacpp, llama.cpp's server without HTTP; the times are the server's own."""
    from importlib.metadata import version

    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_gpu_layers, params.n_parallel = 0, 1
    params.n_ctx = max(plan["n_prompt"], DECODE_PROMPT + plan["n_generate"]) + 8
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = plan["n_threads"]
    start = time.perf_counter()
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - start

    def timings(n, n_predict):
        answer = server.handle_completions({"prompt": ids(n), "n_predict": n_predict,
                                            "temperature": 0, "ignore_eos": True,
                                            "cache_prompt": False})
        return (json.loads(answer) if isinstance(answer, str) else answer)["timings"]

    return {"load_seconds": load_s, "version": f"xllamacpp {version('xllamacpp')}",
            "prefill_tokens_per_second": timings(plan["n_prompt"], 1)["prompt_per_second"],
            "decode_tokens_per_second":
                timings(DECODE_PROMPT, plan["n_generate"])["predicted_per_second"]}


def peak_memory_bytes():
    """Linux hands ru_maxrss on from the process that started this one; VmHWM begins at exec."""
    try:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status
                        if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def main(path, plan):
    for measure in (with_llama_cpp, with_xllamacpp):
        try:
            found = measure(path, json.loads(plan))
            break
        except ImportError:
            continue
    else:
        raise SystemExit(f"{sys.executable} has neither llama_cpp nor xllamacpp")
    print(json.dumps({**found, "peak_memory_bytes": peak_memory_bytes()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
