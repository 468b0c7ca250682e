/* One head's step of the recurrent mixers: see ops_impl.h. The meaning of each is in
 * tinychat/ops/mixers.py. */

/* Columns are values: they are independent of each other, so no sum goes across lanes, and so many
 * at a time that their sums stay in registers. */
#define MIXER_COLUMNS 4 /* vectors */

/* state (n_state, n_value), n_value >= (c + n_vectors) * LANES: state = decay * state + b dt x;
 * out = c state + d x */
INLINE void mamba2_columns(const mamba2_step *step, float *state, int64_t n_value, int64_t n_state,
                           const int n_vectors, int64_t c, float *out)
{
    const mamba2_step s = *step;
    vf input[MIXER_COLUMNS], sum[MIXER_COLUMNS];
    for (int j = 0; j < n_vectors; j++) {
        input[j] = vf_load(s.x + c + j * LANES) * s.dt;
        sum[j] = vf_set(0.0f);
    }
    for (int64_t i = 0; i < n_state; i++)
        for (int j = 0; j < n_vectors; j++) {
            float *at = state + i * n_value + c + j * LANES;
            const vf now = vf_fma(vf_set(s.b[i]), input[j], vf_load(at) * s.decay);
            vf_store(at, now);
            sum[j] = vf_fma(now, vf_set(s.c[i]), sum[j]);
        }
    for (int j = 0; j < n_vectors; j++)
        vf_store(out + c + j * LANES, vf_fma(vf_load(s.x + c + j * LANES), vf_set(s.d), sum[j]));
}

static void mamba2(const mamba2_step *s, float *state, int64_t n_value, int64_t n_state, float *out)
{
    int64_t c = 0;
    for (; c + MIXER_COLUMNS * LANES <= n_value; c += MIXER_COLUMNS * LANES)
        mamba2_columns(s, state, n_value, n_state, MIXER_COLUMNS, c, out);
    for (; c + LANES <= n_value; c += LANES)
        mamba2_columns(s, state, n_value, n_state, 1, c, out);
    for (; c < n_value; c++) {
        const float input = s->dt * s->x[c];
        float sum = 0.0f;
        for (int64_t i = 0; i < n_state; i++) {
            float *at = state + i * n_value + c;
            *at = *at * s->decay + s->b[i] * input;
            sum += *at * s->c[i];
        }
        out[c] = sum + s->d * s->x[c];
    }
}

/* state (n_key, n_value): state *= decay; state += k (v - k state) beta; out = q state. The decayed
 * state is computed twice: cheaper than to store it and load it again. */
INLINE void delta_columns(const delta_net_step *step, float *state, int64_t n_key, int64_t n_value,
                          const int n_vectors, int64_t c, float *out)
{
    const delta_net_step s = *step;
    vf known[MIXER_COLUMNS], delta[MIXER_COLUMNS], sum[MIXER_COLUMNS];
    for (int j = 0; j < n_vectors; j++)
        known[j] = sum[j] = vf_set(0.0f);
    for (int64_t i = 0; i < n_key; i++)
        for (int j = 0; j < n_vectors; j++) {
            const vf now = vf_load(state + i * n_value + c + j * LANES) * s.decay;
            known[j] = vf_fma(now, vf_set(s.k[i]), known[j]);
        }
    for (int j = 0; j < n_vectors; j++)
        delta[j] = (vf_load(s.v + c + j * LANES) - known[j]) * s.beta;
    for (int64_t i = 0; i < n_key; i++)
        for (int j = 0; j < n_vectors; j++) {
            float *at = state + i * n_value + c + j * LANES;
            const vf now = vf_fma(vf_set(s.k[i]), delta[j], vf_load(at) * s.decay);
            vf_store(at, now);
            sum[j] = vf_fma(now, vf_set(s.q[i]), sum[j]);
        }
    for (int j = 0; j < n_vectors; j++)
        vf_store(out + c + j * LANES, sum[j]);
}

static void delta_net(const delta_net_step *s, float *state, int64_t n_key, int64_t n_value,
                      int64_t begin, int64_t end, float *out)
{
    int64_t c = begin;
    for (; c + MIXER_COLUMNS * LANES <= end; c += MIXER_COLUMNS * LANES)
        delta_columns(s, state, n_key, n_value, MIXER_COLUMNS, c, out);
    for (; c + LANES <= end; c += LANES)
        delta_columns(s, state, n_key, n_value, 1, c, out);
    for (; c < end; c++) {
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
