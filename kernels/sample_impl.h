/* What sampling reads of a row of logits: see ops_impl.h. */

/* x where it is finite, -inf elsewhere */
INLINE vf only_finite(vf x)
{
    const vi bits = (vi)x, finite = (bits & 0x7f800000) != 0x7f800000;
    return (vf)((bits & finite) | ((vi)vf_set(-INFINITY) & ~finite));
}

INLINE vf load_row(const float *x, int64_t i, int64_t n)
{
    if (i + LANES <= n)
        return vf_load(x + i);
    float lane[LANES];
    for (int64_t j = 0; j < LANES; j++)
        lane[j] = i + j < n ? x[i + j] : -INFINITY;
    return vf_load(lane);
}

static void group_maxima(const float *x, int64_t n, float *maxima)
{
    for (int64_t g = 0; g < n; g += SAMPLE_GROUP) {
        vf high = vf_set(-INFINITY);
        for (int64_t i = g; i < g + SAMPLE_GROUP && i < n; i += LANES)
            high = vf_max(high, only_finite(load_row(x, i, n)));
        maxima[g / SAMPLE_GROUP] = lanes_max(high);
    }
}

static double exp_sum(const float *x, int64_t n, float high, float scale)
{
    double total = 0.0;
    for (int64_t g = 0; g < n; g += SAMPLE_GROUP) {
        vf sum = vf_set(0.0f);
        for (int64_t i = g; i < g + SAMPLE_GROUP && i < n; i += LANES)
            sum += vf_exp((only_finite(load_row(x, i, n)) - high) * scale);
        total += (double)lanes_sum(sum);
    }
    return total;
}
