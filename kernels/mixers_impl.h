/* One head's step of the recurrent mixers: see ops_impl.h. The meaning of each is in
 * tinychat/ops/mixers.py. */

/* state (n_value, n_state): state = decay * state + dt x b; out = state c + d x */
static void mamba2(const mamba2_step *s, float *state, int64_t n_value, int64_t n_state, float *out)
{
    const int64_t whole = n_state - n_state % LANES;
    const vf decay = vf_set(s->decay);
    for (int64_t p = 0; p < n_value; p++, state += n_state) {
        const float input = s->dt * s->x[p];
        vf sum = vf_set(0.0f);
        for (int64_t i = 0; i < whole; i += LANES) {
            const vf now = vf_load(state + i) * decay + vf_set(input) * vf_load(s->b + i);
            vf_store(state + i, now);
            sum = vf_fma(now, vf_load(s->c + i), sum);
        }
        float total = lanes_sum(sum);
        for (int64_t i = whole; i < n_state; i++) {
            state[i] = state[i] * s->decay + input * s->b[i];
            total += state[i] * s->c[i];
        }
        out[p] = total + s->d * s->x[p];
    }
}

/* state (n_key, n_value): state *= decay; state += k (v - k state) beta; out = q state. Columns of
 * values are independent: so many at a time that their sums stay in registers. */
#define DELTA_COLUMNS 4 /* vectors */

INLINE void delta_columns(const delta_net_step *s, float *state, int64_t n_key, int64_t n_value,
                          const int n_vectors, int64_t c, float *out)
{
    vf known[DELTA_COLUMNS], delta[DELTA_COLUMNS], sum[DELTA_COLUMNS];
    for (int j = 0; j < n_vectors; j++)
        known[j] = sum[j] = vf_set(0.0f);
    for (int64_t i = 0; i < n_key; i++)
        for (int j = 0; j < n_vectors; j++) {
            float *at = state + i * n_value + c + j * LANES;
            const vf now = vf_load(at) * s->decay;
            vf_store(at, now);
            known[j] = vf_fma(now, vf_set(s->k[i]), known[j]);
        }
    for (int j = 0; j < n_vectors; j++)
        delta[j] = (vf_load(s->v + c + j * LANES) - known[j]) * s->beta;
    for (int64_t i = 0; i < n_key; i++)
        for (int j = 0; j < n_vectors; j++) {
            float *at = state + i * n_value + c + j * LANES;
            const vf now = vf_fma(vf_set(s->k[i]), delta[j], vf_load(at));
            vf_store(at, now);
            sum[j] = vf_fma(now, vf_set(s->q[i]), sum[j]);
        }
    for (int j = 0; j < n_vectors; j++)
        vf_store(out + c + j * LANES, sum[j]);
}

static void delta_net(const delta_net_step *s, float *state, int64_t n_key, int64_t n_value,
                      float *out)
{
    int64_t c = 0;
    for (; c + DELTA_COLUMNS * LANES <= n_value; c += DELTA_COLUMNS * LANES)
        delta_columns(s, state, n_key, n_value, DELTA_COLUMNS, c, out);
    for (; c + LANES <= n_value; c += LANES)
        delta_columns(s, state, n_key, n_value, 1, c, out);
    for (; c < n_value; c++) {
        float known = 0.0f, sum = 0.0f;
        for (int64_t i = 0; i < n_key; i++) {
            state[i * n_value + c] *= s->decay;
            known += state[i * n_value + c] * s->k[i];
        }
        const float delta = (s->v[c] - known) * s->beta;
        for (int64_t i = 0; i < n_key; i++) {
            state[i * n_value + c] += s->k[i] * delta;
            sum += state[i * n_value + c] * s->q[i];
        }
        out[c] = sum;
    }
}
