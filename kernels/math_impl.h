/* Functions of vectors: see ops_impl.h. */

/* the sum of the lanes, always in the same order */
INLINE float lanes_sum(vf v)
{
    float lane[LANES];
    vf_store(lane, v);
#pragma GCC unroll 4
    for (int n = LANES / 2; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++)
            lane[i] += lane[i + n];
    return lane[0];
}

/* the first n < LANES values of x, then zeros */
INLINE vf vf_load_some(const float *x, int64_t n)
{
    float lane[LANES] = {0};
    for (int64_t i = 0; i < n; i++)
        lane[i] = x[i];
    return vf_load(lane);
}

/* exp(x), within 2 ulp; 0 below -104, infinity above 88.73.
 * exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; exp(r) by its Taylor polynomial of
 * degree 7. */
INLINE vf vf_exp(vf x)
{
    /* 1.5 * 2^23: adding it rounds to an integer, found in the low bits */
    const vf magic = vf_set(12582912.0f);
    x = vf_max(vf_set(-110.0f), x); /* in this order: a NaN stays one */
    x = -vf_max(vf_set(-110.0f), -x);
    const vf shifted = vf_fma(x, vf_set(1.44269504f), magic);
    const vf n = shifted - magic;
    /* ln 2 in two parts; the first has few bits, so n times it is exact */
    vf r = vf_fma(n, vf_set(-0.693359375f), x);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.0f / 5040);
    p = vf_fma(p, r, vf_set(1.0f / 720));
    p = vf_fma(p, r, vf_set(1.0f / 120));
    p = vf_fma(p, r, vf_set(1.0f / 24));
    p = vf_fma(p, r, vf_set(1.0f / 6));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    p = vf_fma(p, r, vf_set(1.0f));
    /* 2^n in two factors, since n goes beyond the exponents of a float */
    const vi k = (vi)shifted - (vi)magic, half = k >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
}

/* a where the lanes of mask are all ones, b where they are zeros */
INLINE vf vf_select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

INLINE vf vf_abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

INLINE vf vf_with_sign_of(vf x, vf sign) { return (vf)((vi)x | ((vi)sign & INT32_MIN)); }

/* c[0] * x^(n-1) + ... + c[n-1] */
INLINE vf vf_polynomial(vf x, const float *c, const int n)
{
    vf p = vf_set(c[0]);
#pragma GCC unroll 16
    for (int i = 1; i < n; i++)
        p = vf_fma(p, x, vf_set(c[i]));
    return p;
}

/* tanh(x), within 2 ulp: a polynomial below 0.625, above 1 - 2 / (exp(2x) + 1). Source: Cephes,
 * tanhf.c */
INLINE vf vf_tanh(vf x)
{
    static const float small[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                  1.33314422036e-1f, -3.33332819422e-1f};
    const vf high = vf_abs(x), square = x * x;
    const vf below = vf_fma(vf_polynomial(square, small, 5) * square, x, x);
    const vf above = 1.0f - 2.0f / (vf_exp(high + high) + 1.0f);
    return vf_select((vi)(high < 0.625f), below, vf_with_sign_of(above, x));
}

/* 1 + erf(x), within 3e-7: x times a polynomial below 1, above exp(-x²) / x times one. Source:
 * Cephes, ndtrf.c */
INLINE vf vf_one_plus_erf(vf x)
{
    static const float small[] = {7.853861353153693e-5f, -8.010193625184903e-4f,
                                  5.188327685732524e-3f, -2.685381193529856e-2f,
                                  1.128358514861418e-1f, -3.761262582423300e-1f,
                                  1.128379165726710e+0f};
    static const float middle[] = {2.326819970068386e-2f, -1.387039388740657e-1f,
                                   3.687424674597105e-1f, -5.824733027278666e-1f,
                                   6.210004621745983e-1f, -4.944515323274145e-1f,
                                   3.404879937665872e-1f, -2.741127028184656e-1f,
                                   5.638259427386472e-1f};
    static const float large[] = {-1.047766399936249e+1f, 1.297719955372516e+1f,
                                  -7.495518717768503e+0f, 2.921019019210786e+0f,
                                  -1.015265279202700e+0f, 4.218463358204948e-1f,
                                  -2.820767439740514e-1f, 5.641895067754075e-1f};
    const vf high = vf_abs(x), square = x * x, inverse = 1.0f / high, inverse2 = inverse * inverse;
    const vf below = vf_fma(vf_polynomial(square, small, 7), x, vf_set(1.0f));
    const vf p = vf_select((vi)(high < 2.0f), vf_polynomial(inverse2, middle, 9),
                           vf_polynomial(inverse2, large, 8));
    const vf tail = vf_exp(-square) * inverse * p; /* 1 - erf(|x|) */
    const vf above = vf_select((vi)(x < 0.0f), tail, 2.0f - tail);
    return vf_select((vi)(high < 1.0f), below, above);
}
