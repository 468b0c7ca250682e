/* Norms, elementwise operations and ropes of one row: see ops_impl.h. */

/* ---- norms ---- */

INLINE vf vf_load_rest(const float *x, int64_t whole, int64_t n)
{
    return vf_load_some(x + whole, n - whole);
}

static float sum_of(const float *x, int64_t n)
{
    const int64_t whole = n - n % LANES;
    vf sum = vf_set(0.0f);
    for (int64_t i = 0; i < whole; i += LANES)
        sum += vf_load(x + i);
    return lanes_sum(sum + vf_load_rest(x, whole, n));
}

static float sum_of_squares(const float *x, int64_t n)
{
    const int64_t whole = n - n % LANES;
    vf sum = vf_set(0.0f);
    for (int64_t i = 0; i < whole; i += LANES)
        sum = vf_fma(vf_load(x + i), vf_load(x + i), sum);
    const vf rest = vf_load_rest(x, whole, n);
    return lanes_sum(vf_fma(rest, rest, sum));
}

/* x over the root of its mean square, times w */
static void normalise(const float *x, const float *w, int64_t n, float eps, float *out)
{
    const float factor = 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + eps);
    if (w)
        for (int64_t i = 0; i < n; i++)
            out[i] = x[i] * factor * w[i];
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = x[i] * factor;
}

static void rmsnorm(const norm_weights *w, const float *x, int64_t n_groups, int64_t group,
                    float eps, float *out)
{
    for (int64_t g = 0; g < n_groups; g++, x += group, out += group)
        normalise(x, w->scale ? w->scale + g * w->scale_step : NULL, group, eps, out);
}

static void layernorm(const norm_weights *w, const float *x, int64_t n_groups, int64_t group,
                      float eps, float *out)
{
    for (int64_t g = 0; g < n_groups; g++, x += group, out += group) {
        const float mean = sum_of(x, group) / (float)group;
        for (int64_t i = 0; i < group; i++)
            out[i] = x[i] - mean;
        normalise(out, w->scale ? w->scale + g * w->scale_step : NULL, group, eps, out);
        if (w->bias)
            for (int64_t i = 0; i < group; i++)
                out[i] += w->bias[g * w->bias_step + i];
    }
}

/* ---- elementwise ---- */

INLINE vf vf_activation(const int fn, vf x)
{
    switch (fn) {
    case FN_silu:
        return x / (1.0f + vf_exp(-x));
    case FN_gelu: { /* x/2 * (1 + tanh(y)) = x / (1 + exp(-2y)) */
        const vf y = 0.7978845608f * (x + 0.044715f * x * x * x);
        return x / (1.0f + vf_exp(-2.0f * y));
    }
    case FN_gelu_erf:
        return 0.5f * x * vf_one_plus_erf(x * 0.70710678f);
    case FN_gelu_quick:
        return x / (1.0f + vf_exp(-1.702f * x));
    case FN_relu:
        return vf_max(vf_set(0.0f), x); /* in this order: a NaN stays one */
    case FN_relu2: {
        const vf positive = vf_max(vf_set(0.0f), x);
        return positive * positive;
    }
    case FN_sigmoid:
        return 1.0f / (1.0f + vf_exp(-x));
    default:
        return x;
    }
}

INLINE vf vf_gate(const int fn, vf gate, vf up)
{
    if (fn != FN_silu_clamped)
        return vf_activation(fn, gate) * up;
    const vf limit = vf_set(7.0f); /* CLAMP and CLAMPED_SLOPE in meaning.py; NaN stays NaN */
    gate = -vf_max(-limit, -gate);
    up = vf_max(-limit, -vf_max(-limit, -up));
    return gate / (1.0f + vf_exp(-1.702f * gate)) * (up + 1.0f);
}

/* The last vector may go on into the rows' padding. */
static void activate(int fn, const float *x, int64_t n, float *out)
{
#define CASE(name) \
    case FN_##name: \
        for (int64_t i = 0; i < n; i += LANES) \
            vf_store(out + i, vf_activation(FN_##name, vf_load(x + i))); \
        break;
    switch (fn) { ACTIVATIONS(CASE) }
#undef CASE
}

static void gate_row(int fn, const float *gate, const float *up, int64_t n, float *out)
{
#define CASE(name) \
    case FN_##name: \
        for (int64_t i = 0; i < n; i += LANES) \
            vf_store(out + i, vf_gate(FN_##name, vf_load(gate + i), vf_load(up + i))); \
        break;
    switch (fn) { ACTIVATIONS(CASE) }
#undef CASE
}

static void softcap(const float *x, float cap, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i += LANES)
        vf_store(out + i, cap * vf_tanh(vf_load(x + i) / cap));
}

/* a may be out: without the pragma a compiler would have to check for that at each call. */
static void add(const float *a, const float *restrict b, float scale, int64_t n, float *out)
{
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#elif defined(__GNUC__)
#pragma GCC ivdep
#endif
    for (int64_t i = 0; i < n; i++)
        out[i] = a[i] + scale * b[i];
}

static void mul(const float *restrict a, const float *restrict b, int64_t n, float *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = a[i] * b[i];
}

static void scale_row(const float *restrict x, float scale, int64_t n, float *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = x[i] * scale;
}

/* ---- rope ---- */

/* out[i] = x[i] * cos[i] + x[partner of i] * sin[i]; sin is negative for the first of a pair */
static void rope_rows(const float *x, const float *table, int64_t n_heads, int64_t head_dim,
                      int64_t n_rot, int layout, float *out)
{
    const float *restrict cosine = table, *restrict sine = table + n_rot;
    const int64_t half = n_rot / 2;
    for (int64_t h = 0; h < n_heads; h++) {
        const float *restrict from = x + h * head_dim;
        float *restrict to = out + h * head_dim;
        if (layout == ROPE_HALVES) {
            for (int64_t i = 0; i < half; i++)
                to[i] = from[i] * cosine[i] + from[i + half] * sine[i];
            for (int64_t i = half; i < n_rot; i++)
                to[i] = from[i] * cosine[i] + from[i - half] * sine[i];
        } else {
            for (int64_t i = 0; i < n_rot; i += 2) {
                to[i] = from[i] * cosine[i] + from[i + 1] * sine[i];
                to[i + 1] = from[i + 1] * cosine[i + 1] + from[i] * sine[i + 1];
            }
        }
        for (int64_t i = n_rot; i < head_dim; i++)
            to[i] = from[i];
    }
}
